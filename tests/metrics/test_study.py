"""Studies against the measures one by one; refusals before the work."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.metrics.models import classifier
from tests.metrics.studied import LEVELS, B, C, F, data, gradient, noise, same, study
from xai_fast import metrics
from xai_fast.metrics import characterization_score
from xai_fast.metrics.conciseness import conciseness
from xai_fast.metrics.localization import pointing_game, relevance_mass, relevance_rank
from xai_fast.metrics.stability import seed_stability
from xai_fast.metrics.study import Measure, Seeded, Study, StudyContext, run_study


@pytest.fixture(scope="module")
def whole() -> Study:
    return study(measures=[*_study_measures(), "infidelity"])


def _study_measures() -> list[str]:
    return ["fidelity", "deletion", "insertion", "faithfulness", "sensitivity", "conciseness", "localization", "stability"]


# ---- the numbers --------------------------------------------------------------------------------------------------


def test_is_what_the_measures_give_one_by_one(whole: Study) -> None:
    forward, x, labels = data()
    predicted = forward(x).argmax(1)
    maps = gradient(x, predicted)

    def generator() -> torch.Generator:
        return torch.Generator().manual_seed(5)

    found = metrics.fidelity(forward, x, maps, labels, sparsity=list(LEVELS))
    wanted: dict[str, Tensor] = {}
    for kind in ("model", "phenomenon"):
        for form in ("accuracy", "probability"):
            plus, minus = found.per_sample(kind, form)
            wanted |= {f"fid_plus_{kind}_{form}": plus, f"fid_minus_{kind}_{form}": minus}
    wanted["deletion_area"] = metrics.deletion_curve(forward, x, maps).area
    wanted["insertion_area"] = metrics.insertion_curve(forward, x, maps).area
    wanted["faithfulness_correlation"] = metrics.faithfulness_correlation(forward, x, maps, generator=generator())
    wanted["infidelity"] = metrics.infidelity(forward, x, maps, generator=generator())
    radius = 0.05 * float(x.norm(dim=1).median())
    moved = metrics.sensitivity(
        lambda z, target: gradient(z, target), forward, x, radius=radius, n_samples=10, relative=True, target=predicted,
        generator=generator(),
    )  # fmt: skip
    wanted |= {f"sensitivity_{name}": getattr(moved, name) for name in ("max", "mean", "accepted")}
    brief = conciseness(maps)
    wanted |= {name: getattr(brief, name) for name in ("size", "sparsity", "entropy", "gini")}
    mask = x > 0
    wanted |= {"pointing_game": pointing_game(maps, mask), "relevance_mass": relevance_mass(maps, mask)}
    wanted["relevance_rank"] = relevance_rank(maps, mask)
    for name, value in wanted.items():
        torch.testing.assert_close(whole.per_sample("gradient", name, seed=7), value.double(), msg=name)
    assert set(wanted) | {f"stability_{n}" for n in ("variance", "cosine", "spearman", "jaccard")} == {
        name for name in whole.measures if not name.startswith("characterization")
    }
    assert whole.notes == ()


def test_seeds_repeat_and_differ(whole: Study) -> None:
    forward, x, _ = data()
    torch.manual_seed(7)
    weight = torch.randn(F, dtype=torch.float64)
    area = metrics.deletion_curve(forward, x, x * weight).area
    torch.testing.assert_close(whole.per_sample("trained", "deletion_area", seed=7), area)
    runs = []
    for seed in (0, 7):
        torch.manual_seed(seed)
        # Two batches: 4 and 2 samples, each from the start of the seed.
        parts = []
        for size in (4, 2):
            torch.manual_seed(seed)
            parts.append(torch.randn(size, F, dtype=torch.float64))
        runs.append(torch.cat(parts))
    wanted = seed_stability(runs)
    torch.testing.assert_close(whole.per_sample("noise", "stability_spearman"), wanted.spearman)
    torch.testing.assert_close(whole.per_sample("gradient", "stability_cosine"), torch.ones(B, dtype=torch.float64))
    one, other = (whole.per_sample("noise", "gini", seed=s) for s in (0, 7))
    assert not torch.equal(one, other)
    torch.testing.assert_close(whole.per_sample("noise", "gini"), (one + other) / 2)
    assert same(study(measures=["sensitivity", "deletion"]), study(measures=["sensitivity", "deletion"]))


def test_characterization_is_of_the_batch(whole: Study) -> None:
    plus, minus = (whole.per_sample("gradient", f"fid_{s}_model_probability", seed=0) for s in ("plus", "minus"))

    def score(p: Tensor, m: Tensor) -> Tensor:
        return characterization_score(p.mean(0).clamp(0, 1), m.mean(0).clamp(0, 1))

    rows = [r for r in whole.table() if r["measure"] == "characterization_model_probability" and r["seed"] == 0]
    rows = [r for r in rows if r["method"] == "gradient"]
    assert [r["level"] for r in rows] == list(LEVELS)
    torch.testing.assert_close(torch.tensor([r["value"] for r in rows], dtype=torch.float64), score(plus, minus))
    # The jackknife, word for word.
    keep = [[j for j in range(B) if j != i] for i in range(B)]
    without = torch.stack([score(plus[k], minus[k]) for k in keep])
    error = ((B - 1) / B * (without - without.mean(0)).square().sum(0)).sqrt()
    torch.testing.assert_close(torch.tensor([r["standard_error"] for r in rows], dtype=torch.float64), error)
    with pytest.raises(ValueError, match="measure: expected one that samples have, got 'characterization_model_accuracy'"):
        whole.per_sample("gradient", "characterization_model_accuracy")


def test_tables_and_ranking(whole: Study) -> None:
    row = next(r for r in whole.table() if (r["method"], r["seed"], r["measure"]) == ("noise", 7, "gini"))
    values = whole.per_sample("noise", "gini", seed=7)
    assert row["value"] == pytest.approx(float(values.mean()))
    assert row["standard_error"] == pytest.approx(float(values.std() / math.sqrt(B)))
    assert row["n"] == B
    assert row["level"] is None
    both = next(r for r in whole.table(by_seed=False) if (r["method"], r["measure"]) == ("noise", "gini"))
    mean = whole.per_sample("noise", "gini")
    assert both["standard_error"] == pytest.approx(float(mean.std() / math.sqrt(B)))  # samples count, not runs
    wide = {r["method"]: r for r in whole.wide()}
    assert list(wide) == ["gradient", "noise", "trained"]
    assert wide["noise"]["gini"] == pytest.approx(float(mean.mean()))
    ranking = whole.ranking()
    for name, order in ranking.items():
        means = [wide[m][name] for m in order]
        assert means == sorted(means, reverse=whole.better[name] == "higher"), name
    assert "stability_variance" not in ranking
    assert ranking["deletion_area"][0] == "gradient"
    with pytest.raises(ValueError, match="method: expected one of gradient, noise, trained, got 'x'"):
        whole.per_sample("x", "gini")
    with pytest.raises(ValueError, match=r"measure: expected one of .*, got 'x'"):
        whole.per_sample("noise", "x")
    with pytest.raises(ValueError, match=r"seed: expected one of \(0, 7\), got 3"):
        whole.per_sample("noise", "gini", seed=3)


def test_dataframe(whole: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", SimpleNamespace(DataFrame=list))
    assert whole.to_dataframe() == list(whole.table())
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"xai_fast\[study\]"):
        whole.to_dataframe()


def test_missing_masks_and_constant_maps_are_left_out() -> None:
    forward, x, _ = data()
    masks = x > 0
    masks[2] = False
    found = run_study({"gradient": gradient}, forward, x, masks=masks, measures=["localization"])
    for name in ("pointing_game", "relevance_mass", "relevance_rank"):
        assert found.per_sample("gradient", name).isnan().nonzero().tolist() == [[2]]
    assert {row["n"] for row in found.table()} == {B - 1}


def test_counts_and_seconds() -> None:
    forward, x, _ = data()
    sizes = []

    def watched(x: Tensor) -> Tensor:
        sizes.append(len(x))
        return forward(x)

    found = run_study({"noise": noise}, watched, x, sparsity=LEVELS, measures=["fidelity", "conciseness"], batch_size=2)
    assert found.evaluations == {"noise": B * (1 + 2 * len(LEVELS))}
    assert found.explanations == {"noise": B}
    assert sum(sizes) == found.evaluations["noise"] + B  # the outputs, once for the study
    assert max(sizes) == 2
    assert found.seconds["noise"] > 0
    # The same maps for every seed: measured once, but for measures that ask the explainer again.
    steady = run_study({"g": gradient}, watched, x, seeds=(0, 1, 2), sparsity=LEVELS, measures=["fidelity"])
    assert steady.evaluations == {"g": B * (1 + 2 * len(LEVELS))}
    assert torch.equal(*(steady.values["g", s, "fid_plus_model_accuracy"] for s in (0, 2)))


def test_defaults_follow_the_arguments() -> None:
    forward, x, labels = data()

    def measures(**options: Any) -> set[str]:
        return set(run_study({"noise": noise}, forward, x, **options).better)

    plain = measures()
    assert not any("phenomenon" in name or name.startswith(("stability", "relevance", "infidelity")) for name in plain)
    assert {"fid_plus_model_accuracy", "characterization_model_accuracy", "gini", "sensitivity_mean"} <= plain
    assert "fid_plus_phenomenon_accuracy" in measures(labels=labels)
    assert "relevance_mass" in measures(masks=(x > 0).numpy())
    assert "stability_cosine" in measures(seeds=[0, 1])
    single = run_study({"input": lambda inputs: inputs}, lambda x: x.sum(1), x)
    assert set(single.better) == {"deletion_area", "insertion_area", "faithfulness_correlation", "size", "sparsity",
                                  "entropy", "gini"}  # fmt: skip
    tokens = torch.randint(5, (B, 4))
    embedded = torch.randn(5, C, generator=torch.Generator().manual_seed(0))
    found = run_study({"noise": lambda ids: torch.rand(ids.shape)}, lambda ids: embedded[ids].sum(1), tokens)
    assert "sensitivity_mean" not in found.better
    assert not found.notes


def test_maps_with_nan_have_no_score_and_no_first_place() -> None:
    forward, x, labels = data()

    def one_lost(inputs: Tensor, target: Tensor) -> Tensor:
        return gradient(inputs, target).masked_fill((inputs == x[2]).all(1)[:, None], math.nan)

    methods = {"all lost": lambda inputs: inputs * math.nan, "one lost": one_lost, "noise": noise}
    with pytest.warns(UserWarning, match="NaN in the maps"):
        found = run_study(methods, forward, x, labels, masks=x > 0, seeds=(0, 1), batch_size=4)
    assert found.notes == tuple(
        f"{method} lost, seed {seed}: NaN in the maps of {count} of {B} samples, whose scores are NaN"
        for method, count in (("all", B), ("one", 1)) for seed in (0, 1)
    )  # fmt: skip
    assert found.nan_samples == {"all lost": B, "one lost": 1}
    for (method, _, name), values in found.values.items():
        if name != "sensitivity_accepted":  # what the model does to the neighbours
            unknown = {"all lost": range(B), "one lost": [2], "noise": []}[method]
            assert values.view(B, -1).isnan().all(1).nonzero().flatten().tolist() == list(unknown), (method, name)
    assert all(order == ["noise", "one lost"] for order in found.ranking().values())


def test_inputs_stay_as_they_are() -> None:
    forward, x, labels = data()
    before, state = x.clone(), torch.get_rng_state()
    numpy_state = np.random.get_state()[1].copy()  # noqa: NPY002

    def rude(inputs: Tensor, target: Tensor) -> Tensor:
        np.random.rand(3)  # noqa: NPY002
        return inputs.mul_(torch.randn_like(inputs))

    run_study({"rude": rude}, forward, x, labels, measures=["conciseness", "sensitivity"])
    assert torch.equal(x, before)
    assert not x.requires_grad
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002


def test_patches_groups_and_further_arguments() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(4, 2, 4, 4, generator=generator)
    model = classifier(32, C).float()
    scale = torch.rand(4, 1, generator=generator) + 0.5

    def forward(x: Tensor, scale: Tensor) -> Tensor:
        return model(x) * scale

    def explain(inputs: Tensor, target: Tensor) -> Tensor:
        return inputs.abs().sum(1, keepdim=True)

    def scaled(inputs: Tensor, target: Tensor, additional_forward_args: Any = ()) -> Tensor:
        return inputs * additional_forward_args[0][:, :, None, None]

    options = {"additional_forward_args": scale, "batch_size": 3, "sparsity": (0.5,)}
    found = run_study({"sum": explain}, forward, images, patch_size=2, **options)
    maps = explain(images, torch.empty(0))
    wanted = metrics.fidelity(
        forward, images, maps, sparsity=0.5, patch_size=2, form="probability", additional_forward_args=scale
    )
    got = found.per_sample("sum", "fid_plus_model_probability").mean()
    torch.testing.assert_close(got, wanted.fid_plus)
    with pytest.warns(UserWarning, match="sensitivity failed, ValueError: additional_forward_args: expected none"):
        found = run_study({"scaled": scaled}, forward, images, measures=["conciseness", "sensitivity"], **options)
    torch.testing.assert_close(
        found.per_sample("scaled", "gini"), conciseness(images * scale[..., None, None]).gini.double()
    )
    assert found.per_sample("scaled", "sensitivity_max").isnan().all()


# ---- ways to explain ----------------------------------------------------------------------------------------------


class WithAttribute:
    def attribute(self, inputs: Tensor, target: Any = None) -> tuple[Tensor]:
        return (inputs * (target[:, None] + 1),)


class Module(torch.nn.Module):
    def forward(self, inputs: Tensor, target: Tensor) -> Tensor:
        return inputs * (target[:, None] + 1)


@pytest.mark.parametrize(
    ("explainer", "targeted"),
    [
        (lambda inputs, target: inputs * (target[:, None] + 1), True),
        (lambda x, classes: x * (classes[:, None] + 1), True),
        (lambda x, *, target: x * (target[:, None] + 1), True),
        (lambda x, scale=1.0, target=None: scale * x * (target[:, None] + 1), True),
        (lambda x, **options: x * (options["target"][:, None] + 1), True),
        (lambda *arguments: arguments[0] * (arguments[1][:, None] + 1), True),
        (WithAttribute(), True),
        (Module(), True),
        (Seeded(lambda seed: WithAttribute()), True),
        (lambda inputs: inputs, False),
        (lambda inputs, steps=20: inputs * (steps / 20), False),
    ],
)
def test_explainers_are_called_as_they_ask(explainer: Any, targeted: bool) -> None:
    forward, x, _ = data()
    target = torch.tensor([0, 1, 2, 0, 1, 2])

    def maps(context: StudyContext) -> Tensor:
        return context.attributions.sum(1)

    found = run_study({"one": explainer}, forward, x, target=target, measures={"sum": maps}, batch_size=4)
    wanted = x * (target[:, None] + 1) if targeted else x
    torch.testing.assert_close(found.per_sample("one", "sum"), wanted.sum(1))


def test_explainers_of_the_package_get_the_target() -> None:
    forward, x, _ = data()
    methods = {"free": metrics.gradient_explanation(forward), "fixed": metrics.gradient_explanation(forward, 1)}
    found = run_study(methods, forward, x, target=2, measures={"sum": lambda c: c.attributions.sum(1)})
    for method, target in (("free", 2), ("fixed", 1)):
        wanted = metrics.gradient_explanation(forward, target)(x).sum(1)
        torch.testing.assert_close(found.per_sample(method, "sum"), wanted)


# ---- measures of one's own, and those that fail -------------------------------------------------------------------


def test_own_measures() -> None:
    forward, x, _ = data()

    def shape(context: StudyContext) -> dict[str, Tensor]:
        assert torch.equal(context.explain(context.inputs, context.target), context.attributions)
        norms = context.attributions.flatten(1).norm(dim=1)
        return {"norm": norms, "by_level": norms[:, None] * torch.tensor(context.sparsity)}

    own = Measure(shape, better={"norm": "lower"})
    methods = {"one": lambda inputs: inputs, "half": lambda inputs: inputs / 2}
    found = run_study(methods, forward, x, measures={"shape": own, "conciseness": None}, sparsity=LEVELS)
    torch.testing.assert_close(found.per_sample("one", "norm"), x.norm(dim=1))
    assert found.per_sample("one", "by_level").shape == (B, 2)
    assert found.ranking()["norm"] == ["half", "one"]
    assert "by_level" not in found.ranking()
    assert run_study(methods, forward, x, measures=[shape]).better == {"norm": None, "by_level": None}


def test_what_cannot_be_measured_is_nan_with_a_note() -> None:
    forward, x, _ = data()
    stored = gradient(x, forward(x).argmax(1))

    def of_the_data_alone(inputs: Tensor, target: Tensor) -> Tensor:
        if len(inputs) != B or not torch.equal(inputs, x):
            raise RuntimeError("no map\nfor these inputs")
        return stored

    methods = {"stored": of_the_data_alone, "noise": noise}
    with pytest.warns(UserWarning, match="stored, seed 0: sensitivity failed, RuntimeError: no map$"):
        found = run_study(methods, forward, x, sparsity=LEVELS)
    assert found.notes == ("stored, seed 0: sensitivity failed, RuntimeError: no map",)
    assert found.per_sample("stored", "sensitivity_mean").isnan().all()
    assert found.ranking()["sensitivity_mean"] == ["noise"]
    assert found.ranking()["deletion_area"][0] == "stored"
    assert math.isnan(found.wide()[0]["sensitivity_max"])

    def failing(context: StudyContext) -> dict[str, Tensor]:
        if context.method == "noise":
            raise KeyError("nothing")
        return {"mine": torch.ones(B, len(LEVELS))}

    with pytest.warns(UserWarning, match="noise, seed 0: failing failed, KeyError"):
        found = run_study(methods, forward, x, sparsity=LEVELS, measures=[failing])
    assert found.per_sample("noise", "mine").shape == (B, 2)
    assert found.per_sample("noise", "mine").isnan().all()


def test_memory_errors_are_no_property_of_a_method() -> None:
    def greedy(context: StudyContext) -> Tensor:
        raise MemoryError("too much")

    with pytest.raises(MemoryError, match="too much"):
        study(measures=[greedy])


# ---- refusals -----------------------------------------------------------------------------------------------------


def never(inputs: Tensor) -> Tensor:
    raise AssertionError("the work began")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"explainers": []}, TypeError, "explainers: expected a dict of name to explainer, got list"),
        ({"explainers": {}}, ValueError, "explainers: expected at least one, got none"),
        ({"explainers": {"a": 3}}, TypeError, r"explainers\['a'\]: expected a callable .*, got int"),
        ({"explainers": {1: never}}, TypeError, "explainers: expected names, got int"),
        ({"seeds": 3}, TypeError, "seeds: expected a sequence of whole numbers, got 3"),
        ({"seeds": [1, 1]}, ValueError, r"seeds: expected at least one, each once, got \(1, 1\)"),
        ({"seeds": [-1]}, ValueError, "seeds: expected a whole number from 0"),
        ({"seed": 0.5}, TypeError, "seed: expected a whole number, got float"),
        ({"sparsity": [0.5, 1.5]}, ValueError, "sparsity: expected shares from 0 to 1"),
        ({"sparsity": None}, TypeError, "sparsity: expected a number or a sequence of numbers, got NoneType"),
        ({"target": 3}, ValueError, "target: expected classes from 0 to 2, got 3 to 3"),
        ({"masks": torch.ones(2, F)}, ValueError, f"masks: expected {B} masks or 1"),
        ({"batch_size": 0}, ValueError, "batch_size: expected a whole number of at least 1"),
        ({"baseline": "black"}, ValueError, r"measures\['fidelity'\]: baseline: expected one of zero, mean"),
        ({"patch_size": 2}, ValueError, r"measures\['fidelity'\]: patch_size: expected maps of one channel"),
        ({"measures": "deletion"}, TypeError, "measures: expected names, a dict of name to options, or callables"),
        ({"measures": []}, ValueError, "measures: expected at least one, each once, got none"),
        ({"measures": ["deletion", "deletion"]}, ValueError, "measures: .* got 'deletion' twice"),
        ({"measures": ["delete"]}, ValueError, "measures: expected one of fidelity, .* got 'delete'"),
        (
            {"measures": {"deletion": 3}},
            TypeError,
            r"measures\['deletion'\]: expected a dict of options or a callable, got int",
        ),
        (
            {"measures": {"deletion": {"step": 3}}},
            TypeError,
            r"measures\['deletion'\]: expected options among steps, .* 'step'",
        ),
        ({"measures": {"deletion": {"steps": 0}}}, ValueError, r"measures\['deletion'\]: steps: expected a whole number"),
        ({"measures": {"insertion": {"baseline": "x"}}}, ValueError, r"measures\['insertion'\]: baseline: expected one of"),
        ({"measures": {"sensitivity": {"radius": -1}}}, ValueError, r"measures\['sensitivity'\]: radius: expected a number"),
        ({"measures": {"sensitivity": {"norm_ord": 1}}}, ValueError, "norm_ord: expected 2 or inf"),
        ({"measures": {"faithfulness": {"subset_size": F + 1}}}, ValueError, r"measures\['faithfulness'\]: subset_size"),
        ({"measures": {"infidelity": {"n_samples": 0}}}, ValueError, r"measures\['infidelity'\]: n_perturb_samples"),
        ({"measures": {"conciseness": {"threshold": -1}}}, ValueError, r"measures\['conciseness'\]: threshold"),
        ({"measures": {"localization": {"distance": "x"}}}, ValueError, r"measures\['localization'\]: distance"),
        ({"measures": {"stability": {"top_k": 0}}, "seeds": (0, 1)}, ValueError, r"measures\['stability'\]: top_k"),
        ({"measures": {"fidelity": {"robust": 3}}}, TypeError, r"measures\['fidelity'\]: robust"),
        ({"measures": ["localization"], "masks": None}, ValueError, "masks: expected ground-truth masks for the measure"),
        ({"measures": ["stability"], "seeds": [0]}, ValueError, "seeds: expected at least two for the measure 'stability'"),
        ({"measures": {"attributions": never}}, ValueError, "measures: expected another name than 'attributions'"),
        ({"path": 3}, TypeError, "path: expected a str or Path, got int"),
    ],
)
def test_refused_before_the_work_begins(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        study(**{"explainers": {"never": never}, **options})


def test_other_models_cannot_have_all_measures() -> None:
    _, x, labels = data()
    for name, argument in (("fidelity", "forward"), ("sensitivity", "forward")):
        with pytest.raises(ValueError, match=f"{argument}: expected class scores"):
            run_study({"never": never}, lambda x: x.sum(1), x, measures=[name])
    with pytest.raises(ValueError, match="inputs: expected a floating tensor for the measure 'infidelity'"):
        run_study({"never": never}, lambda x: x.double(), (x > 0).long(), measures=["infidelity"])
    with pytest.raises(ValueError, match="labels: expected None"):
        run_study({"never": never}, lambda x: x.sum(1), x, labels)


def test_refused_while_it_runs() -> None:
    forward, x, _ = data()
    with pytest.raises(ValueError, match=r"explainers\['a'\]: expected maps of shape \(6, ...\), got \(3, 8\)"):
        run_study({"a": lambda inputs: inputs[:3]}, forward, x)
    with pytest.raises(TypeError, match=r"explainers\['a'\]: maps: expected a torch.Tensor, got list"):
        run_study({"a": lambda inputs: [1, 2]}, forward, x)
    with pytest.raises(TypeError, match=r"explainers\['a'\]: expected a callable"):
        run_study({"a": Seeded(lambda seed: 3)}, forward, x)
    for result, error, message in (
        (3.0, TypeError, "expected a dict of tensors, got float"),
        ({"n": 3.0}, TypeError, "expected tensors, got float for 'n'"),
        ({"n": torch.ones(3)}, ValueError, r"expected shape \(6,\) or \(6, 5\), got \(3,\) for 'n'"),
        ({"gini": torch.ones(B)}, ValueError, "expected names of its own, got 'gini' of 'conciseness'"),
    ):
        with pytest.raises(error, match=rf"measures\['own'\]: {message}"):
            run_study({"n": noise}, forward, x, measures={"conciseness": {}, "own": lambda c, r=result: r})


# ---- what is shown --------------------------------------------------------------------------------------------------


def test_progress_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tqdm")
    study(progress=True, measures=["deletion", "stability"])
    shown = capsys.readouterr().err
    assert "15/15" in shown
    assert "trained, stability" in shown
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(ImportError, match=r"xai_fast\[study\]"):
        study(progress=True, measures=["deletion"])


def test_pictures(whole: Study) -> None:
    pytest.importorskip("matplotlib")
    from xai_fast import viz

    assert len(whole.plot_fidelity().axes) == 1
    assert len(whole.plot_by_sparsity().axes) == 3
    assert viz.plot_bars(whole, title="all").axes
    assert viz.plot_radar(whole).axes[0].name == "polar"
    assert viz.plot_fidelity(whole, kind="phenomenon", form="accuracy").axes[0].get_title(loc="left").endswith("accuracy")
    assert viz.plot_by_sparsity(whole, measures=["fid_plus_model_accuracy"]).axes
    with pytest.raises(ValueError, match="measures: expected measures by sparsity, got 'gini'"):
        whole.plot_by_sparsity(["gini"])
    bars = whole.plot_bars(["gini"]).axes[0]
    assert [bar.get_width() for bar in bars.patches] == pytest.approx([row["gini"] for row in whole.wide()])
    assert replace(whole, methods=("noise",)).plot_bars(["gini"]).axes


def test_options_are_tried_with_all_the_groups_of_the_batch() -> None:
    forward, x, _ = data()
    groups = torch.stack([torch.arange(F).clamp(max=2) + 2 * (i % 2) for i in range(B)])  # 0 to 2 and 2 to 4
    options = {"measures": {"faithfulness": {"subset_size": 5}}, "feature_mask": 10 * groups}
    assert not run_study({"g": gradient}, forward, x, **options).notes


@pytest.mark.parametrize("batch_size", [4, 16])
def test_noise_of_an_explainer_counts_in_its_sensitivity(batch_size: int) -> None:
    """Perturbed samples get noise of their own, whatever the batches: the same noise would look perfectly steady."""
    x = torch.eye(4) + 1
    study = run_study(
        {"noise": lambda inputs: torch.rand_like(inputs)},
        lambda x: x * 10,
        x,
        measures={"sensitivity": {"n_samples": 4, "radius": 0.01}},
        batch_size=batch_size,
    )
    assert study.per_sample("noise", "sensitivity_max").min() > 0.1
