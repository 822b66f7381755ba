"""The command that plans an experiment's steps."""

import jax
import pytest

from experiments import flow_matching, plan
from tmdjax.harness import ConfigError, load_config
from tmdjax.train.planning.flops import count_work

PAPER = "--config=configs/flow_matching.py:paper"


def test_flops_of_the_published_network():
    step, shapes, _ = flow_matching.updates(load_config(PAPER[9:]))["update"]
    # DiT-XL/2 is 118.64 G multiply-adds an image (arXiv 2212.09748, table 4): forward,
    # twice backward, and once more for remat.
    published = 2 * 118.64e9 * 4 * 256
    found = count_work(jax.make_jaxpr(step)(*shapes)).flops
    assert sum(found.values()) == pytest.approx(published, rel=0.01)


def test_prints_what_is_described_and_planned(capsys):
    assert plan.main([PAPER, "--mesh=fsdp=2", "--device=v5e"]) == 0
    out = capsys.readouterr().out
    assert "674816272" in out
    assert "data=1 x fsdp=2 x tensor=1" in out
    assert "memory of v5e, GB" in out
    assert "cannot tell" in out


@pytest.mark.nightly
def test_what_does_not_fit(capsys):
    assert plan.main([PAPER, "--device=v5e"]) == 1
    out = capsys.readouterr().out
    assert "but v5e has 14.4 GB (16 GB less a margin of 10%)" in out
    assert "The smallest mesh that fits is data=1 x fsdp=2 x tensor=1" in out


def test_bad_inputs(refused):
    def plan_refused(words, *arguments, error=ConfigError):
        refused(words, plan.main, [*arguments], error=error)

    smoke = "--config=configs/boss.py:smoke"
    plan_refused("boss.py:smoke names no step to plan", smoke)
    plan_refused("'fdsp=8' is not like data=1,fsdp=8", PAPER, "--mesh=fdsp=8")
    plan_refused("unknown device 'h10'", PAPER, "--device=h10", error=ValueError)
    words = "unknown argument '--devices'. Did you"
    plan_refused(words, PAPER, "--devices=h100")
    plan_refused("give --config")
