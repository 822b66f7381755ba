"""The command that plans an experiment's steps."""

import pytest

from experiments import flow_matching, plan
from tmdjax import train
from tmdjax.harness import ConfigError, load_config

PAPER = "--config=configs/flow_matching.py:paper"


def test_flops_of_the_published_network():
    step, shapes, donated = flow_matching.planned(load_config(PAPER[9:]))["update"]
    found = train.plan(step, *shapes, donate_argnums=donated, device="h100")
    # DiT-XL/2 is 118.64 G multiply-adds an image (arXiv 2212.09748, table 4): forward,
    # twice backward, and once more for remat.
    published = 2 * 118.64e9 * 4 * 256
    assert sum(found.flops.values()) == pytest.approx(published, rel=0.01)
    # Float32 parameters, their average and two moments.
    assert found.aliased == pytest.approx(4 * 4 * 675e6, rel=0.002)


def test_prints_what_is_described_and_planned(capsys):
    assert plan.main([PAPER, "--mesh=fsdp=8", "--config.train.batch_size=512"]) == 0
    out = capsys.readouterr().out
    assert "674816272" in out
    assert "data=1 x fsdp=8 x tensor=1" in out
    assert "memory of h100, GB" in out


def test_what_does_not_fit(capsys):
    assert plan.main([PAPER, "--device=v5e"]) == 1
    out = capsys.readouterr().out
    assert "but v5e has 14.4 GB (16 GB less a margin of 10%)" in out
    assert "The smallest mesh that fits is data=1 x fsdp=2 x tensor=1" in out


def test_bad_inputs():
    with pytest.raises(ConfigError, match="boss.py names no step to plan"):
        plan.main(["--config=configs/boss.py:smoke"])
    with pytest.raises(ConfigError, match="'fdsp=8' is not like data=1,fsdp=8"):
        plan.main([PAPER, "--mesh=fdsp=8"])
    with pytest.raises(ValueError, match="unknown device 'h10'"):
        plan.main([PAPER, "--device=h10"])
    with pytest.raises(ConfigError, match="unknown argument '--devices'. Did you"):
        plan.main([PAPER, "--devices=h100"])
    with pytest.raises(ConfigError, match="give --config"):
        plan.main([])
