"""8 bits beside 16 in supervised training: what arms share, and what is judged."""

import pytest

from experiments import fp8_training
from experiments.arms import of_arm
from tmdjax.harness import check_experiment, load_config
from tmdjax.harness.config import to_plain
from tmdjax.harness.experiment import measured


def config_of(tier="smoke", *changes):
    return load_config(f"configs/fp8_training.py:{tier}", list(changes))


def test_arms_of_a_network_differ_in_their_recipe_alone():
    config = config_of("cpu")
    for network in ("dit", "decoder"):
        found = {}
        for recipe in ("bf16", "fp8_block", "fp8_rowwise"):
            own = to_plain(of_arm(config, f"{network}_{recipe}"))
            assert own.pop("precision") == {"rollout": recipe, "train": recipe}
            found[recipe] = own
        assert found["bf16"] == found["fp8_block"] == found["fp8_rowwise"]
        assert found["bf16"]["model"]["name"] == network


def test_bad_inputs(refused):
    describe = fp8_training.describe
    refused(
        "tokens; length=8: raise it", describe, config_of("smoke", "texts.length=8")
    )
    config = config_of("smoke", "arms.decoder_fp8_block.precision.train=fp8")
    refused("precision.train: unknown GEMM recipe 'fp8'", describe, config)
    config = config_of("smoke", "arms.decoder_bf16.task.name=chain_sums")
    refused("'chain_sums' is not one of .*Did you mean", describe, config)


@pytest.mark.slow
def test_it_judges_every_arm_in_its_own_precision(ran):
    config = config_of("smoke", "features.steps=5")
    found = ran(fp8_training, config)
    assert measured(check_experiment(fp8_training), config) <= found.keys()
    for network in ("dit", "decoder"):
        wide, narrow = (
            {n: found[f"{network}_{recipe}/{n}"] for n in fp8_training.GAINED}
            for recipe in ("bf16", "fp8_block")
        )
        assert wide["loss_before"] == pytest.approx(narrow["loss_before"], rel=0.01)
        assert wide["gain"] > 0 and narrow["gain"] > 0
        # the same training, rounded differently
        assert wide["loss_after"] != narrow["loss_after"]
        assert wide["loss_after"] == pytest.approx(narrow["loss_after"], rel=0.05)
        assert found[f"{network}_fp8_block/skipped_updates"] == 0
    # a new DiT is silent in every precision
    assert found["dit_bf16/loss_before"] == found["dit_fp8_block/loss_before"]
    assert 0 <= found["decoder_fp8_block/accuracy"] <= 1
