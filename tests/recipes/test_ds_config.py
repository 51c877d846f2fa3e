import json
from pathlib import Path

import pytest

from engine.errors import UsageError
from recipes.lib import ds_config

pytestmark = pytest.mark.timeout(30)
GIVEN = {
    "train_micro_batch_size_per_gpu": 4,
    "train_batch_size": 8,
    "gradient_clipping": 10.0,
    "zero_optimization.stage": 2,
}
DEFAULTS = {"bf16.enabled": False}
SHIPPED = Path(__file__).resolve().parents[2] / "ds_configs"


@pytest.fixture
def write(tmp_path):
    def write_config(**changes: object) -> Path:
        config = {"train_batch_size": "auto", "gradient_clipping": "auto", "zero_optimization": {"stage": 2}, **changes}
        path = tmp_path / "ds.json"
        path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
        return path

    return write_config


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_shipped_files_resolve(stage):
    given = {**GIVEN, "gradient_accumulation_steps": 1, "zero_optimization.stage": stage}
    config = ds_config.load(SHIPPED / f"causvid_zero{stage}.json", given, DEFAULTS)
    assert config["train_micro_batch_size_per_gpu"] == 4
    assert config["train_batch_size"] == 8
    assert config["gradient_clipping"] == 10.0
    assert config["bf16"] == {"enabled": False}
    assert config["zero_allow_untested_optimizer"] is True
    assert config["zero_force_ds_cpu_optimizer"] is False
    assert "auto" not in json.dumps(config)


def test_an_equal_explicit_value_stays(write):
    assert ds_config.load(write(train_batch_size=8), GIVEN, DEFAULTS)["train_batch_size"] == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_batch_size": 16}, '"train_batch_size" is 16, but the command line makes it 8'),
        ({"zero_optimization": {"stage": 3}}, '"zero_optimization.stage" is 3, but the command line makes it 2'),
        ({"gradient_clipping": None}, '"gradient_clipping" is missing'),
        ({"zero_optimization": {}}, '"zero_optimization.stage" is missing'),
        ({"fp16": {"enabled": "auto"}}, '"fp16.enabled" is "auto", but only these can be: bf16.enabled'),
        ({"optimizer": {"type": "Adam"}}, 'remove "optimizer"'),
        ({"scheduler": {"type": "WarmupLR"}}, 'remove "scheduler"'),
    ],
)
def test_what_does_not_fit_is_an_error_that_names_it(write, changes, message):
    with pytest.raises(UsageError) as error:
        ds_config.load(write(**changes), GIVEN, DEFAULTS)
    assert message in str(error.value)
    assert "ds.json" in str(error.value)


def test_a_default_gives_way_to_an_explicit_value(write):
    assert ds_config.load(write(bf16={"enabled": True}), GIVEN, DEFAULTS)["bf16"]["enabled"] is True
    assert ds_config.load(write(bf16={"enabled": "auto"}), GIVEN, DEFAULTS)["bf16"]["enabled"] is False


@pytest.mark.parametrize("content", [None, "{"])
def test_an_unreadable_file_is_an_error(tmp_path, content):
    path = tmp_path / "ds.json"
    if content:
        path.write_text(content)
    with pytest.raises(UsageError, match="cannot be read as JSON"):
        ds_config.load(path, GIVEN, DEFAULTS)
