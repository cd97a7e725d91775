from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import pytest

from bitdistill.report import figures, panel
from bitdistill.report.inspect import layer_stats
from bitdistill.report.run_folder import StageLog

from .conftest import TinyModel, pack_tiny

HOSTILE = "</text><script>alert(1)</script>$\\frac{x$ \"quoted\" & 'so' #010101 url(#x) 1.23456"


def log(values: list[float], key: str = "loss") -> StageLog:
    return StageLog("sft", [{"step": i + 1, "tokens": 10 * (i + 1), key: v} for i, v in enumerate(values)])


def parsed(figure: panel.Figure | None) -> ElementTree.Element:
    assert figure is not None
    return ElementTree.fromstring(figure.svg)


def all_text(figure: panel.Figure | None) -> str:
    return " ".join(parsed(figure).itertext())


def test_svg_is_one_offline_element_with_css_colours() -> None:
    figure = figures.loss_curve(log([3.0, 2.0, 1.0]), "Stage")
    root = parsed(figure)
    assert root.tag == "svg"
    assert root.get("role") == "img"
    assert root.get("viewBox") == f"0 0 {panel.WIDTH} {panel.HEIGHT}"
    assert figure is not None
    assert "var(--s0)" in figure.svg
    assert "http" not in figure.svg
    assert not re.search(r"#0[1-5]0[1-5]0[0-5]", figure.svg)
    assert "<style" not in figure.svg
    assert "tokens seen" in all_text(figure)


def test_ids_differ_between_figures_and_references_resolve() -> None:
    pages = [figures.loss_curve(log([3.0, 2.0, 1.0]), "Stage") for _ in range(2)]
    seen: set[str] = set()
    for page in pages:
        assert page is not None
        ids = re.findall(r'\bid="([^"]+)"', page.svg)
        assert len(ids) == len(set(ids))
        assert not seen & set(ids)
        seen |= set(ids)
        for reference in re.findall(r'(?:url\(#|href="#)([^")]+)', page.svg):
            assert reference in ids


def test_hostile_names_stay_text() -> None:
    figure = figures.score_bars([(HOSTILE, 50.0, 40.0, 60.0)], "accuracy (%)")
    assert figure is not None
    assert "<script" not in figure.svg
    assert HOSTILE[:12] in all_text(figure)
    assert "1.23456" in all_text(figures.size_bars([("a (1.23456)", 10)]))


def test_curve_notes_say_first_last_and_steps() -> None:
    figure = figures.loss_curve(StageLog("sft", log([4.0, 1.0]).records, nonfinite=2), "Stage")
    assert figure is not None
    assert figure.note.startswith("4 → 1 nats in 2 steps.")
    assert "2 non-finite values are not drawn" in figure.note
    late = [record | {"step": 10 * int(record["step"])} for record in log([4.0, 1.0]).records]
    figure = figures.loss_curve(StageLog("sft", late), "Stage")
    assert figure is not None
    assert figure.note.startswith("4 (step 10) → 1 nats in 20 steps.")
    figure = figures.loss_curve(StageLog("sft", late[-1:]), "Stage")  # a short stage logs its end alone
    assert figure is not None
    assert figure.note == "1 nats after 20 steps."


@pytest.mark.parametrize("values", [[], [float("nan")]])
def test_nothing_to_draw_is_no_figure(values: list[float]) -> None:
    assert figures.loss_curve(log(values), "Stage") is None
    assert figures.loss_terms(log(values)) is None
    assert figures.gamma_balance(log(values), 1.0) is None
    assert figures.weight_histogram("none", {}) is None
    assert figures.zero_shares("none", []) is None
    assert figures.score_bars([], "accuracy") is None
    assert figures.size_bars([]) is None


def test_single_values_and_zeros_are_drawn() -> None:
    assert "tokens seen" in all_text(figures.loss_curve(log([2.0]), "Stage"))
    records = [{"step": 1, "tokens": 0, "ce": 1.0, "ld": 0.0, "ad": 0.0}]
    text = all_text(figures.loss_terms(StageLog("distill", records)))
    assert "cross-entropy" in text
    assert "attention relations" not in text  # nothing positive to put on a log axis
    more = [{**records[0], "ad": 2.0, "hidden": 0.3, "prompt": 0.5}]
    text = all_text(figures.loss_terms(StageLog("distill", more)))
    assert all(name in text for name in ("attention relations", "block outputs", "prompt's tokens"))


def test_long_logs_are_thinned_but_keep_spikes() -> None:
    values = [1.0] * 50_000
    values[31_234] = 99.0
    xs, ys = panel.thin([float(i) for i in range(50_000)], values)
    assert len(xs) <= panel.MAX_POINTS + 2
    assert xs == sorted(xs)
    assert (xs[0], xs[-1]) == (0.0, 49_999.0)
    assert max(ys) == 99.0
    figure = figures.loss_curve(log(values), "Stage")
    assert figure is not None
    assert len(figure.svg) < 60_000


def test_smoothing_by_hand() -> None:
    assert panel.smooth([1.0, 2.0, 6.0, 3.0], window=3) == pytest.approx([1.5, 3.0, 11 / 3, 4.5])
    assert panel.smooth([5.0, 7.0]) == [5.0, 7.0]


def test_histogram_names_models_and_leaves_packed_ones_out() -> None:
    before, after = layer_stats(TinyModel(blocks=1)), layer_stats(TinyModel(blocks=1, gathered=True))
    packed = layer_stats(pack_tiny(TinyModel(blocks=1)))
    figure = figures.weight_histogram("All", {"before": before, "after": after, "packed": packed})
    text = all_text(figure)
    assert "before" in text
    assert "after" in text
    assert "packed" not in text
    assert figures.weight_histogram("All", {"packed": packed}) is None
    assert figure is not None
    total = sum(layer.weights for layer in before)
    near = sum(layer.latent.near_share * layer.weights for layer in before if layer.latent) / total
    assert f"{100 * near:.1f}% before," in figure.note


def test_density_is_a_share_of_all_weights() -> None:
    density = figures.density(layer_stats(TinyModel(blocks=2)))
    assert density is not None
    assert len(density) == 61
    assert 0.97 < sum(density) <= 1.0


def test_gamma_panel_shows_target_only_when_there_is_one() -> None:
    balanced = log([30.0, 2.0, 1.0], key="ad_ce_ratio")
    assert "target" in all_text(figures.gamma_balance(balanced, 1.0))
    assert "target" not in all_text(figures.gamma_balance(balanced, None))


def test_style_does_not_leak() -> None:
    import matplotlib as mpl

    mpl.use("agg")
    with mpl.rc_context({"font.size": 33.0, "text.parse_math": True}):
        before = dict(mpl.rcParams)
        figures.loss_curve(log([3.0, 2.0]), "Stage")
        assert dict(mpl.rcParams) == before
