"""Settings from TOML and their limits."""

from __future__ import annotations

import pytest

from st_align.config import override, preset, read_toml
from st_align.errors import ConfigError


def test_a_file_goes_over_the_preset(tmp_path):
    (tmp_path / "c.toml").write_text("[optim]\nbatch = 7\n")
    config = read_toml(tmp_path / "c.toml", preset("open"))
    assert (config.preset, config.optim.batch, config.model) == ("open", 7, preset("open").model)


def test_a_file_does_not_choose_the_preset(tmp_path):
    (tmp_path / "c.toml").write_text('preset = "paper"\n')
    with pytest.raises(ConfigError, match="preset is chosen on the command line") as caught:
        read_toml(tmp_path / "c.toml", preset("tiny"))
    assert "--preset paper" in caught.value.fix


@pytest.mark.parametrize("seed", [-1, -(2**40)])
def test_a_negative_seed(seed):
    with pytest.raises(ConfigError, match=r"optim\.seed >= 0"):
        override(preset("tiny"), {"optim": {"seed": seed}})
