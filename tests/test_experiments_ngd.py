"""All examples of normalised descent: verdicts of a short run, and mutations that flip them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from verdicts import Data, conducted, mutated, surprises

from experiments import ngd_examples

SHORT = ngd_examples.Config(
    steps=200, long=250, lengths=(1.0,), exponents=(0.25,), constants=(0.8,), hovering=(), factorisations=1
)


@pytest.fixture(scope="module")
def ngd(tmp_path_factory: pytest.TempPathFactory) -> Data:
    return conducted(ngd_examples, SHORT, tmp_path_factory.mktemp("ngd"))


def test_what_needs_no_long_descents_comes_out_as_declared(ngd: Data) -> None:
    numbers = {"law", "flow", "quartic_rate", "early", "powers", "rotated", "nearest", "small", "kept", "lowered"}
    ends = {"plain", "plain_median", "hover", "attractor", "factors", "factors_most", "unbalanced"}
    assert not (numbers | ends) & surprises(ngd_examples, ngd)


def test_descents_that_are_too_short_are_told(ngd: Data) -> None:
    assert {"along", "short", "quartic", "stopped"} <= surprises(ngd_examples, ngd)


def long_enough(ngd: Data) -> Data:
    """Put all ends of the smooth valleys where they are after many steps."""

    def change(data: Data) -> None:
        for name in ngd_examples.VALLEYS:
            run = ngd_examples.found(data, name, SHORT.steps)
            flat = ngd_examples.Valley.of(name).flat[0].tolist()
            run.update(ends=[flat] * 100, along=[1e-9] * 100, distance=[SHORT.steps**-0.25] * 100)

    return mutated(ngd, change)


def test_gradient_descent_in_place_of_normalised_steps_is_told(ngd: Data) -> None:
    smooth = {"near", "along", "flat"}
    data = long_enough(ngd)
    assert not smooth & surprises(ngd_examples, data)

    def swap(data: Data) -> None:
        stuck = ngd_examples.found(data, "product", 1000, lr=0.01, method="plain")
        run = ngd_examples.found(data, "product", SHORT.steps)
        run.update({name: stuck[name] for name in ("ends", "along", "distance")})

    assert smooth <= surprises(ngd_examples, mutated(data, swap))


@pytest.mark.parametrize(
    ("change", "numbers"),
    [
        (lambda data: data["plane"]["product"]["c"].update(plain=[1.0, 0.5]), {"kept"}),
        (lambda data: data["plane"]["cubic"].update(c_end=1.0), {"lowered"}),
        (lambda data: data["attractor"].update(t=[0.01] * 100), {"attractor"}),
        (lambda data: [end.update(sharpness=6.3) for end in data["factors"]], {"factors", "factors_most"}),
        (lambda data: [end.update(imbalance=1e-9) for end in data["factors"]], {"unbalanced"}),
        (lambda data: data["numbers"].update(law=1 / 0.9799554566), {"law"}),
    ],
)
def test_each_number_is_told(ngd: Data, change: Callable[[Data], None], numbers: set[str]) -> None:
    assert surprises(ngd_examples, mutated(ngd, change)) - surprises(ngd_examples, ngd) == numbers


def test_the_kink_is_told(ngd: Data) -> None:
    def trapped(data: Data) -> None:
        run = ngd_examples.found(data, ngd_examples.CLARKE, SHORT.long, decay=0.4)
        run["points"][:20] = [[1.0, 0.0, 1.0]] * 20
        run["along"][:20] = [0.247] * 20

    def free(data: Data) -> None:
        right = ngd_examples.found(data, "absolute 1 0", SHORT.long, decay=0.4)
        ngd_examples.found(data, ngd_examples.CLARKE, SHORT.long, decay=0.4).update(points=right["points"])

    data = mutated(ngd, trapped)
    assert not {"kink", "kink_far"} & surprises(ngd_examples, data)
    assert {"kink", "kink_far"} <= surprises(ngd_examples, mutated(data, free))


def test_the_wrong_decay_flips_the_fourth_order_valley() -> None:
    slow, fast = (ngd_examples.descended(ngd_examples.key("quartic", 1000, decay=q)) for q in (1 / 6, 0.5))
    assert ngd_examples.within(slow["along"], 1e-3) > 70 and ngd_examples.within(fast["along"], 1e-3) <= 3
