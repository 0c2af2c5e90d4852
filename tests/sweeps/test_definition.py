"""Sweep files: how arms are made, and everything that is refused before a run starts."""

import pathlib

import numpy as np
import pytest

from modse_jax.config.loading import override_options, to_option_dict
from modse_jax.errors import UserError
from modse_jax.sweeps import definition, dry_run, matching, planning
from modse_jax.sweeps.definition import Arm, Sweep, axis, chain, choices, product, seeds, zip_axes
from modse_jax.training import hyperparameters
from tests.helpers.configs import tiny_config
from tests.helpers.steps import initial_state

RATES = axis("optimizer.learning_rate", (1e-3, 3e-3, 1e-2))


def make_sweep(arms, **options):
    return Sweep(base=to_option_dict(tiny_config()), arms=arms, **options)


def names(arms):
    return [arm.name for arm in arms]


def test_product_zip_and_chain_make_named_arms():
    widths = choices({"narrow": {"moe.width": 4, "moe.widths": ()}, "wide": {"moe.top_k": 1}})
    rates = axis("optimizer.learning_rate", (1e-3, 1e-2))
    arms = chain(
        product(widths, rates), zip_axes(widths, rates, seeds(3, 4)), choices({"base": {}})
    )
    assert names(arms) == [
        "narrow learning_rate=0.001",
        "narrow learning_rate=0.01",
        "wide learning_rate=0.001",
        "wide learning_rate=0.01",
        "narrow learning_rate=0.001 seed=3",
        "wide learning_rate=0.01 seed=4",
        "base",
    ]
    resolved = {arm.name: arm.config for arm in definition.resolve_arms(make_sweep(arms))}
    last = resolved["wide learning_rate=0.01 seed=4"]
    assert (last.moe.top_k, last.optimizer.learning_rate) == (1, 1e-2)
    assert (last.seed, last.data.shuffle_seed) == (4, 4)
    assert resolved["base"] == tiny_config()
    assert matching.varying_options(definition.resolve_arms(make_sweep(RATES))) == [
        "optimizer.learning_rate"
    ]


def test_complete_configs_are_arms_that_axes_override():
    configs = definition.from_configs({"one": tiny_config(moe=dict(top_k=1)), "two": tiny_config()})
    arms = definition.resolve_arms(Sweep(arms=product(configs, RATES)))
    assert names(arms)[:2] == ["one learning_rate=0.001", "one learning_rate=0.003"]
    assert arms[0].config.moe.top_k == 1 and arms[3].config.moe.top_k == 2


@pytest.mark.parametrize(
    ("arms", "message"),
    [
        ([], "the sweep has no arms"),
        (choices({"a": {}, "b": {"moe.top_k": 2}}), "'a' and 'b' have the same config"),
        ([Arm("a", {}), Arm("a", {"seed": 1})], "two arms are named 'a'"),
        (choices({"a": {"moe.widht": 4}}), "arm 'a': unknown option moe.widht; did you mean moe.w"),
        (choices({"a": {"moe.top_k": 5}}), "arm 'a': moe.top_k=5 is larger"),
        (choices({"a": {"moe.top_k": 1.5}}), "arm 'a': moe.top_k=1.5 must be of type int"),
    ],
)
def test_bad_arms_are_refused(arms, message):
    with pytest.raises(UserError, match=message):
        definition.resolve_arms(make_sweep(arms))


def test_axes_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="'learning_rate=0.001 learning_rate=0.001': two axes set"):
        product(RATES, RATES)
    with pytest.raises(UserError, match="the axes have 1 and 3 arms"):
        zip_axes(RATES, seeds(0))
    with pytest.raises(UserError, match="'a' has no config, and the sweep no base"):
        definition.resolve_arms(Sweep(arms=choices({"a": {}})))


def test_arms_that_are_not_matched_are_refused_with_their_numbers():
    arms = choices({"k1": {"moe.top_k": 1}, "k2": {}, "long": {"training.steps": 12}})

    def check(**options):
        sweep = make_sweep(arms, **options)
        matching.check_matched(sweep, definition.resolve_arms(sweep))

    with pytest.raises(
        UserError, match=r"tokens: 'k1' has 1,536 and 'long' has 3,072, 100.000% more, .* 0.000%"
    ):
        check(fixed={"tokens": 0})
    with pytest.raises(UserError, match="flops_per_token: 'k1' has 61,056 and 'long' has 67,968"):
        check(fixed={"flops_per_token": 0.1})
    check(fixed={"flops_per_token": 0.2, "total_parameters": 0})
    check(fixed={"tokens": 0}, fixed_within=("training.steps",))
    with pytest.raises(UserError, match="fixed names 'token', which is unknown; did you mean 'tok"):
        check(fixed={"token": 0})
    with pytest.raises(UserError, match="fixed_within names 'model.dims'.* mean 'model.dim'"):
        check(fixed={"tokens": 0}, fixed_within=("model.dims",))


def test_comparing_shapes_at_too_few_rates_gives_a_warning():
    shapes = choices({"k1": {"moe.top_k": 1}, "k2": {}})

    def warning(arms, **options):
        sweep = make_sweep(arms, **options)
        return matching.find_missing_rates(sweep.compares_shapes, definition.resolve_arms(sweep))

    assert "2 of 2 shapes are trained at fewer than 3" in warning(product(shapes, RATES[:2]))
    mixed = chain(product(shapes[:1], RATES), shapes[1:])
    assert "1 of 2 shapes" in warning(mixed) and "'k2'" in warning(mixed)
    assert not warning(product(shapes, RATES))
    assert not warning(product(shapes, RATES[:1]), compares_shapes=False)
    assert not warning(RATES[:2])  # one shape


def test_sweep_files_that_fail_are_refused_with_the_line(tmp_path):
    file = tmp_path / "sweep.py"
    for text, message in (
        ("x = 1", "has no function get_sweep"),
        ("def get_sweep():\n    return 1", r"get_sweep\(\) returned int, not Sweep"),
        ("def get_sweep():\n    return 1 / 0", r"ZeroDivisionError: .*sweep.py, line 2"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=message):
            definition.load_sweep(str(file))
    with pytest.raises(UserError, match="missing.py is not a file"):
        definition.load_sweep(str(tmp_path / "missing.py"))


def test_arms_of_a_seed_share_initial_weights_that_do_not_depend_on_their_shape():
    config = tiny_config(seed=5)
    other = override_options(
        config, {"moe.num_experts": 8, "moe.widths": (), "moe.pairs": False, "moe.width": 6}
    )
    dense = override_options(config, {"model.dense_width": 24})
    first = initial_state(config).params
    for config in (other, dense):
        params = initial_state(config).params
        for path in (("embedding",), ("head",), ("blocks", "attention", "w_query")):
            one, two = first, params
            for name in path:
                one, two = one[name], two[name]
            np.testing.assert_array_equal(one, two, err_msg=str(path))


def test_runs_share_programs_if_only_numbers_seeds_and_data_names_differ():
    config = tiny_config(moe=dict(bias_rule="sign"))
    key = hyperparameters.shared_program_config(config)
    same = {
        "seed": 1,
        "data.shuffle_seed": 2,
        "data.source": "text:elsewhere",
        "optimizer.learning_rate": 1.0,
        "optimizer.final_learning_rate": 0.5,
        "optimizer.weight_decay": 0.0,
        "moe.balance_loss_weight": 0.0,
        "moe.z_loss_weight": 1.0,
        "moe.bias_rate": 0.1,
        "training.log_every": 3,
    }
    assert hyperparameters.shared_program_config(override_options(config, same)) == key
    for option, value in {
        "training.steps": 7,  # the end of the schedule
        "moe.top_k": 1,
        "optimizer.beta1": 0.8,
        "moe.width_penalty_weight": 0.1,  # the penalty is left out at 0
        "data.sequence_length": 16,
    }.items():
        changed = override_options(config, {option: value})
        assert hyperparameters.shared_program_config(changed) != key, option


def test_dry_run_describes_every_arm(tmp_path, capsys):
    path = pathlib.Path(__file__).parents[2] / "configs" / "sweeps" / "micro_rates.py"
    arms = planning.load_sweep(str(path)).arms
    assert not capsys.readouterr().err  # no warning: there are four rates
    text = dry_run.describe_sweep(arms, None, flops_per_second=1e10)
    rows = {line[:20].strip(): line[20:].split() for line in text.splitlines()}
    assert len(arms) == 12
    # n, k, s, g, E, G, A, parameters, FLOPs per token, tokens: study.md, 8.5
    assert rows["n32 g1/4 rate=0.003"][:10] == (
        ["32", "4", "8", "1/4", "8", "4", "1/8", "660,720", "1,345,536", "1,474,560"]
    )
    assert rows["dense rate=0.01"][:7] == ["1"] * 7
    assert "12 arms, 17,694,720 tokens, 2.365e+13 FLOPs; 39m25s at 1e+10 FLOP/s" in text
