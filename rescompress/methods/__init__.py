"""Methods: one file per kind of reduction, named after its tag."""
