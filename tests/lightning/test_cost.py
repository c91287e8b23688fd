import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

pytest.importorskip("lightning")
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger

from rescompress.errors import RescompressWarning
from rescompress.lightning import Classifier
from rescompress.lightning._costs import COLUMNS, predict, read_rows, shapes_of
from rescompress.lightning.cost import CostMonitor
from rescompress.measure import count_macs, count_training_macs, live_activation_bytes, parameter_count
from rescompress.measure._peak import resident_bytes
from tests.lightning.tiny import TINY, Tiny

# Lightning's advice on tiny data: no workers, few batches, no validation.
pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


class Images(Dataset):
    """A few images with labels."""

    def __init__(self, side=8, count=8):
        self.images = torch.randn(count, 3, side, side)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index], index % 5


class Foreign(LightningModule):
    """Somebody's module, which knows nothing of rescompress."""

    def __init__(self, net=None):
        super().__init__()
        self.net = net or nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(5))
        self.net(torch.randn(2, 3, 8, 8))

    def forward(self, images):
        return self.net(images)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self(batch[0])

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def trainer(tmp_path, *callbacks, **options):
    options = {"logger": False, "enable_checkpointing": False, "max_epochs": 1, "log_every_n_steps": 1} | options
    return Trainer(
        accelerator="cpu",
        devices=1,
        default_root_dir=tmp_path,
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def loader(**options):
    return DataLoader(Images(**options), batch_size=4)


def test_the_predictions_are_those_of_measure_for_the_batches_that_came(tmp_path):
    module, monitor = Foreign(), CostMonitor()
    trainer(tmp_path, monitor).fit(module, loader(), DataLoader(Images(), batch_size=2))
    row, batch = monitor.rows[0], torch.zeros(4, 3, 8, 8)
    assert (row["training_shape"], row["inference_shape"]) == ("4x3x8x8", "2x3x8x8")
    assert row["parameters"] == parameter_count(module.net)
    assert row["macs"] == count_macs(module.net, batch[:1]).macs > 0
    assert row["training_macs"] == count_training_macs(module.net, batch) // 4
    assert row["training_live_bytes"] == live_activation_bytes(module.net, batch, training=True)
    assert row["inference_live_bytes"] == live_activation_bytes(module.net, batch[:2])


def test_the_attribute_that_holds_the_model_is_what_is_predicted(tmp_path):
    module, monitor = Foreign(), CostMonitor(model="part")
    module.part = nn.Conv2d(3, 1, 1)  # stands beside what is trained
    trainer(tmp_path, monitor, strategy="auto").fit(module, loader())
    assert monitor.rows[0]["parameters"] == 4
    assert monitor.rows[0]["macs"] == 3 * 64


class Clockwork:
    """Time that passes only where the test says so."""

    now = 0.0

    def perf_counter(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


@pytest.fixture
def clockwork(monkeypatch):
    clock = Clockwork()
    monkeypatch.setattr("rescompress.lightning._meters.time", clock)
    return clock


def test_waiting_preparing_computing_and_validating_are_told_apart(tmp_path, clockwork):
    class Slow(Foreign):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            clockwork.sleep(0.5)
            return batch

        def training_step(self, batch, batch_idx):
            clockwork.sleep(3.0 + batch_idx)
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            clockwork.sleep(10.0)

    class SlowToRead(Images):
        def __getitem__(self, index):
            clockwork.sleep(0.25)
            return super().__getitem__(index)

    monitor = CostMonitor()
    slow = DataLoader(SlowToRead(count=12), batch_size=4)
    trainer(tmp_path, monitor, val_check_interval=1, max_epochs=2).fit(Slow(), slow, loader())
    for row in monitor.rows.values():
        assert (row["steps"], row["images"]) == (3, 12)
        assert row["step_ms"] == pytest.approx(4000)  # the median of 3, 4 and 5 seconds
        assert row["prepare_ms"] == pytest.approx(500)
        assert row["waited_s"] == pytest.approx(12 * 0.25)
        assert row["seconds"] == pytest.approx(3 + 3 * 0.5 + 12)
        assert row["waited_share"] == pytest.approx(3 / 16.5)
        assert row["images_per_s"] == pytest.approx(12 / 16.5)
        assert row["inference_step_ms"] == pytest.approx(10_000)
        assert row["inference_images_per_s"] == pytest.approx(0.4)


def test_the_peaks_of_training_and_of_validation_are_kept_apart(tmp_path):
    class Hungry(Foreign):
        def training_step(self, batch, batch_idx):
            torch.ones(50_000_000).sum()  # 200 MB
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            torch.ones(12_500_000).sum()  # 50 MB

    monitor = CostMonitor()
    trainer(tmp_path, monitor, val_check_interval=1).fit(Hungry(), loader(), loader())
    row = monitor.rows[0]
    if row["memory_how"] != "VmHWM":
        pytest.skip("this system does not forget a peak")
    assert 190e6 < row["training_peak_bytes"] - row["start_bytes"] < 300e6
    assert 45e6 < row["inference_peak_bytes"] - row["start_bytes"] < 150e6


def test_what_is_made_before_the_first_test_batch_is_no_part_of_the_peak(tmp_path):
    class Deploys(Foreign):
        def on_test_start(self):
            torch.ones(100_000_000).sum()  # 400 MB

    monitor, before = CostMonitor(), resident_bytes()
    trainer(tmp_path, monitor).test(Deploys(), loader(), verbose=False)
    if monitor.summary()["memory_how"] != "VmHWM":
        pytest.skip("this system does not forget a peak")
    assert monitor.summary()["inference_peak_bytes"] - before < 250e6


class Recorder(Logger):
    """Keeps what it is given."""

    name, version = "recorder", 0

    def __init__(self):
        super().__init__()
        self.given = []

    def log_metrics(self, metrics, step=None):
        self.given.append((step, metrics))

    def log_hyperparams(self, params, *args, **kwargs):
        pass


def test_every_logger_and_the_file_get_every_epoch(tmp_path):
    monitor, recorders = CostMonitor(folder=str(tmp_path / "run")), [Recorder(), Recorder()]
    files = CSVLogger(tmp_path)
    trainer(tmp_path, monitor, logger=[*recorders, files], max_epochs=3).fit(Foreign(), loader(), loader())
    for recorder in recorders:
        given = [(step, metrics) for step, metrics in recorder.given if "cost/step_ms" in metrics]
        assert [(step, metrics["epoch"]) for step, metrics in given] == [(2, 0), (4, 1), (6, 2)]
        assert ["cost/macs" in metrics for _, metrics in given] == [True, False, False]  # predicted once
        assert given[1][1]["cost/images_per_s"] == monitor.rows[1]["images_per_s"]
    assert "cost/step_ms" in (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text()
    rows = read_rows(tmp_path / "run" / "cost.csv")
    assert [row["epoch"] for row in rows] == [0, 1, 2]
    assert rows == [{name: monitor.rows[epoch].get(name) for name in COLUMNS} for epoch in range(3)]


def test_the_folder_is_that_of_the_first_logger_by_default(tmp_path):
    trainer(tmp_path, CostMonitor(), logger=CSVLogger(tmp_path, name="a", version="b")).fit(Foreign(), loader())
    assert (tmp_path / "a" / "b" / "cost.csv").exists()


class Killed(Exception):
    pass


class Kill(Callback):
    """Ends the run at one batch of one epoch."""

    def __init__(self, epoch, batch):
        self.at = epoch, batch

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == self.at:
            raise Killed


@pytest.mark.parametrize("at_validation", [False, True])
def test_a_resumed_run_goes_on_with_the_rows_and_repeats_none(tmp_path, at_validation):
    # A checkpoint that is written after the validation of an epoch comes before the row of that epoch.
    def saving():
        return ModelCheckpoint(tmp_path, filename="one", save_on_train_epoch_end=not at_validation)

    def run(*callbacks, **options):
        monitor = CostMonitor()
        trainer(tmp_path, monitor, saving(), *callbacks, enable_checkpointing=True, max_epochs=4).fit(
            Foreign(), loader(), loader(), **options
        )
        return monitor

    (tmp_path / "cost.csv").write_text("of another run\n")
    with pytest.raises(Killed):
        run(Kill(2, 0))
    before = read_rows(tmp_path / "cost.csv")
    assert [row["epoch"] for row in before] == [0, 1]
    checkpoint = next(tmp_path.glob("one*.ckpt"))
    monitor = run(ckpt_path=checkpoint, weights_only=True)
    rows = read_rows(tmp_path / "cost.csv")
    assert [row["epoch"] for row in rows] == [0, 1, 2, 3] == list(monitor.rows)
    assert rows[:2] == before
    assert [row["steps"] for row in rows] == [2, 2, 2, 2]


def test_a_run_from_the_beginning_drops_the_rows_of_an_older_one(tmp_path):
    for epochs in (3, 1):
        trainer(tmp_path, CostMonitor(), max_epochs=epochs).fit(Foreign(), loader())
    assert [row["epoch"] for row in read_rows(tmp_path / "cost.csv")] == [0]


def test_a_full_disk_costs_no_training_and_no_row(tmp_path, monkeypatch):
    monitor, replace = CostMonitor(), __import__("os").replace

    def full(source, target):
        if len(monitor.rows) == 2:
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr("rescompress.files.os.replace", full)
    said = r"cost\.csv: No space left on device; free some space and the next epoch writes all rows$"
    with pytest.warns(RescompressWarning, match=said):
        trainer(tmp_path, monitor, max_epochs=2).fit(Foreign(), loader())
    assert [row["epoch"] for row in read_rows(tmp_path / "cost.csv")] == [0]
    assert [path.name for path in tmp_path.iterdir()] == ["cost.csv"]


def test_a_dry_run_measures_and_writes_nothing(tmp_path):
    monitor = CostMonitor()
    dry = trainer(tmp_path, monitor, fast_dev_run=2)
    profiler = dry.profiler
    dry.fit(Foreign(), loader(), loader())
    assert monitor.rows[0]["steps"] == 2
    assert not list(tmp_path.iterdir())
    assert dry.profiler is profiler


def test_a_test_alone_tells_what_inference_costs(tmp_path, clockwork):
    class Slow(Foreign):
        def test_step(self, batch, batch_idx):
            clockwork.sleep(2.0)

    module, monitor = Slow(), CostMonitor()
    trainer(tmp_path, monitor).test(module, loader(), verbose=False)
    found = monitor.summary()
    assert found["macs"] == count_macs(module.net, torch.zeros(1, 3, 8, 8)).macs
    assert found["inference_step_ms"] == pytest.approx(2000)
    assert found["inference_images_per_s"] == pytest.approx(2)


def test_of_several_test_loaders_the_size_of_the_validation_is_measured(tmp_path, clockwork):
    class AnySize(Foreign):
        def __init__(self):
            super().__init__(nn.Sequential(nn.Conv2d(3, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()))

        def test_step(self, batch, batch_idx, dataloader_idx=0):
            clockwork.sleep(batch[0].shape[-1])

    module, monitor = AnySize(), CostMonitor()
    run = trainer(tmp_path, monitor)
    run.fit(module, loader(side=16), loader(side=8))
    run.test(module, [loader(side=16), loader(side=8), loader(side=32)], verbose=False)
    found = monitor.summary()
    assert found["inference_shape"] == "4x3x8x8"
    assert found["inference_step_ms"] == pytest.approx(8000)


def test_of_several_sizes_of_our_data_that_of_the_score_is_measured_by_a_test_alone(tmp_path):
    monitor, data = CostMonitor(), Tiny()
    data.test_sizes = [64, 32, 48]
    module = Classifier(TINY, num_classes=4, input_size=32)
    trainer(tmp_path, monitor).test(module, data, verbose=False)
    assert monitor.summary()["inference_shape"] == "4x3x32x32"


def test_the_summary_is_of_the_whole_run(tmp_path):
    monitor = CostMonitor()
    trainer(tmp_path, monitor, max_epochs=3).fit(Foreign(), loader())
    rows, total = list(monitor.rows.values()), monitor.summary()
    assert total["images"] == 24
    assert total["step_ms"] == sorted(row["step_ms"] for row in rows)[1]
    assert total["training_peak_bytes"] == max(row["training_peak_bytes"] for row in rows)
    seconds = sum(row["seconds"] for row in rows)
    assert total["waited_share"] == pytest.approx(sum(row["waited_s"] for row in rows) / seconds)


def test_the_run_ends_with_a_line_of_the_share_of_time_waited_for_data(tmp_path, clockwork, caplog):
    class Slow(Foreign):
        def training_step(self, batch, batch_idx):
            clockwork.sleep(1.0 + self.current_epoch)
            return super().training_step(batch, batch_idx)

    class SlowToRead(Images):
        def __getitem__(self, index):
            clockwork.sleep(0.5)
            return super().__getitem__(index)

    monitor = CostMonitor()
    with caplog.at_level("INFO"):
        trainer(tmp_path, monitor, max_epochs=2).fit(Slow(), DataLoader(SlowToRead(), batch_size=4))
    rows = list(monitor.rows.values())
    assert [row["waited_share"] for row in rows] == pytest.approx([4 / 6, 4 / 8])
    (line,) = [one.getMessage() for one in caplog.records if one.getMessage().startswith("cost: ")]
    share = sum(row["waited_share"] * row["seconds"] for row in rows) / sum(row["seconds"] for row in rows)
    assert f", {share:.1%} of the time waited for data, " in line
    assert "cost: 1500.0 ms a step, 1.1 images/s, 57.1% of" in line


def test_a_model_that_cannot_be_measured_is_trained_all_the_same(tmp_path):
    class Stubborn(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 5)

        def __deepcopy__(self, memo):
            raise RuntimeError("not to be copied")

        def forward(self, images):
            return self.layer(images.mean((2, 3)))

    monitor = CostMonitor()
    with pytest.warns(RescompressWarning, match="leaves .*training_macs.* empty|leaves inference_live_bytes empty"):
        trainer(tmp_path, monitor).fit(Foreign(Stubborn()), loader())
    assert monitor.rows[0]["training_macs"] is None
    assert monitor.rows[0]["parameters"] == 20
    assert monitor.rows[0]["steps"] == 2
    assert read_rows(tmp_path / "cost.csv")[0]["training_macs"] is None


@pytest.mark.parametrize("training", [True, False])
def test_one_rank_predicts_alone_what_synchronised_layers_cost(training):
    def net(norm):
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(norm(4)), nn.Flatten(), nn.Linear(144, 5))

    batch, synchronised = torch.zeros(4, 3, 8, 8), net(nn.SyncBatchNorm)
    assert predict(shapes_of(synchronised), batch, training) == predict(net(nn.BatchNorm2d), batch, training)
    assert isinstance(synchronised[1][0], nn.SyncBatchNorm)


@pytest.mark.gpu
def test_on_cuda_the_device_itself_is_asked(tmp_path):
    class Busy(Foreign):
        def __init__(self):
            super().__init__()
            self.register_buffer("square", torch.ones(4096, 4096))

        def training_step(self, batch, batch_idx):
            for _ in range(50):
                self.square @ self.square  # queued: the host is through at once
            return super().training_step(batch, batch_idx)

    monitor = CostMonitor()
    Trainer(
        accelerator="cuda",
        devices=1,
        default_root_dir=tmp_path,
        callbacks=[monitor],
        logger=False,
        max_epochs=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(Busy(), loader(count=64), loader())
    row = monitor.rows[0]
    assert row["memory_how"] == "cuda"
    assert row["training_reserved_bytes"] >= row["training_peak_bytes"] > row["start_bytes"] > 64e6
    assert row["step_ms"] > 1  # 7 TFLOP
    assert row["waited_share"] < 0.5
