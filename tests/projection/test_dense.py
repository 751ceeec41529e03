"""What only the stored Gaussian P promises: its limit, and tensors that do not depend on each other."""

import pytest
import torch
from helpers.oracle import draw

from peft_intrinsic.projection import Shape, Spec, dense
from peft_intrinsic.projection.dense import build_dense


def test_tensors_do_not_depend_on_each_other():
    shapes = {"w": Shape(9, 7), "v": Shape(5, 1), "one": Shape(1, 1), "wide": Shape(2, 30)}
    together = build_dense(Spec(7, 0, 1, "fan_in"), shapes)
    for name, shape in shapes.items():
        alone = build_dense(Spec(7, 0, 1, "fan_in"), {name: shape})[name]
        assert torch.equal(alone.materialize(draw(7)), together[name].materialize(draw(7)))


def test_more_entries_than_the_limit_raise_an_error_that_names_fastfood(monkeypatch):
    with pytest.raises(ValueError, match=r"1099511627776 x 2 entries.* Use projection='fastfood'"):
        build_dense(Spec(2, 0, 1, "fan_in"), {"a": Shape(2**20, 2**20)})
    monkeypatch.setattr(dense, "LIMIT", 60)
    build_dense(Spec(3, 0, 1, "fan_in"), {"a": Shape(3, 5), "b": Shape(5, 1)})  # 60 entries
    with pytest.raises(ValueError, match="21 x 3 entries, more than 60"):
        build_dense(Spec(3, 0, 1, "fan_in"), {"a": Shape(3, 5), "b": Shape(6, 1)})
