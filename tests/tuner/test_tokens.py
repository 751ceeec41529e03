"""`trainable_token_indices`: rows of embeddings that are fully trained, as in LoRA."""

import pytest
import torch
from conftest import build, evaluate
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from peft_intrinsic import AdapterBank, IntrinsicConfig, save_as_lora
from peft_intrinsic.codec import compress

INDEX = {"input_ids": torch.tensor([[1, 2, 5, 7], [3, 2, 2, 9]])}
NAME = {"gpt2": "wte", "llama": "embed_tokens", "bert": "word_embeddings", "t5": "shared"}


def logits(model):
    with torch.no_grad():
        return model.eval()(**INDEX).logits


def tuned(family, indices, **options):
    options = {"d": 40, "init_weights": False, **options}
    model = get_peft_model(build(family), IntrinsicConfig(trainable_token_indices=indices, **options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "trainable_tokens_delta" in name and parameter.requires_grad:
                parameter.add_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter))
    return model


@pytest.mark.parametrize("family", ["llama", "gpt2"])  # output layer of its own, and tied
@pytest.mark.parametrize("form", ["list", "dictionary"])
def test_token_rows_are_loaded_and_equal_a_base_with_these_rows(family, form, tmp_path):
    options = {"projection": "fastfood"}  # value biases depend on the embedding of the base
    model = tuned(family, [2, 5] if form == "list" else {NAME[family]: [2, 5]}, **options)
    expected = logits(model)
    rows = next(p for name, p in model.named_parameters() if "trainable_tokens_delta" in name)
    assert model.get_nb_trainable_parameters()[0] == 40 + rows.numel()
    model.save_pretrained(tmp_path)
    assert sum(t.numel() for t in load_file(tmp_path / "adapter_model.safetensors").values()) == 40 + rows.numel()
    assert torch.equal(logits(PeftModel.from_pretrained(build(family), tmp_path)), expected)

    # Independent of PEFT's wrapper: the same θ on a base whose embedding has these rows.
    base = build(family)
    with torch.no_grad():
        base.get_input_embeddings().weight[[2, 5]] = rows
    plain = get_peft_model(base, IntrinsicConfig(d=40, **options))
    with torch.no_grad():
        plain.base_model.vector.intrinsic_theta["default"].weight.copy_(
            model.base_model.vector.intrinsic_theta["default"].weight
        )
    torch.testing.assert_close(logits(plain), expected)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-5, atol=1e-5)


def test_indices_set_after_the_configuration_was_made_are_used(tmp_path):
    config = IntrinsicConfig(d=40)
    config.trainable_token_indices["embed_tokens"] = [1]  # as TRL does for the tokens of a new chat template
    model = get_peft_model(build("llama"), config)
    assert [name for name, p in model.named_parameters() if p.requires_grad and "tokens_delta" in name]
    model.save_pretrained(tmp_path)
    assert IntrinsicConfig.from_pretrained(tmp_path).trainable_token_indices == {"embed_tokens": [1]}


def test_token_rows_are_stored_in_a_lora(tmp_path):
    model = tuned("llama", [2, 5], target_modules=["q_proj"])
    expected = logits(model)
    save_as_lora(tmp_path, model)
    loaded = PeftModel.from_pretrained(build("llama"), tmp_path)
    assert isinstance(loaded.peft_config["default"], LoraConfig)
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-5, atol=1e-5)


def test_samples_with_different_token_rows_get_their_own():
    model = tuned("llama", [2, 5])
    model.add_adapter("other", IntrinsicConfig(d=40, init_weights=False, trainable_token_indices=[2]))
    alone = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        alone[name] = logits(model)
    assert not torch.allclose(alone["default"], alone["other"], atol=1e-3)
    with torch.no_grad():
        mixed = model(**INDEX, adapter_names=["other", "default"]).logits
    torch.testing.assert_close(mixed[0], alone["other"][0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mixed[1], alone["default"][1], rtol=1e-5, atol=1e-5)


def test_packing_banks_and_sums_raise_for_token_rows():
    model = tuned("llama", [2], projection="global", block_size=64)
    with pytest.raises(ValueError, match=r"trainable_token_indices=\[2\] of adapter 'default'"):
        AdapterBank(model, torch.zeros(1, 40))
    with pytest.raises(ValueError, match=r"trainable_token_indices=\[2\] of adapter 'default' cannot be combined"):
        model.base_model.add_weighted_adapter(["default"], [1.0], "sum")
    with pytest.raises(ValueError, match=r"trainable_token_indices=\[2\] is trained fully"):
        compress(model)


@pytest.mark.parametrize(
    ("indices", "error", "message"),
    [
        ({"embed": [1]}, ValueError, "the model has no embedding 'embed'"),
        ([1, 1], ValueError, "different indices from 0 to"),
        ([-1], ValueError, "different indices from 0 to"),
        ([10**6], ValueError, "different indices from 0 to"),
        ({"embed_tokens": []}, ValueError, "at least one"),
        ({"embed_tokens": [1.5]}, TypeError, "list of ints"),
        ({"embed_tokens": "12"}, TypeError, "list of ints"),
    ],
)
def test_invalid_indices_raise(indices, error, message):
    with pytest.raises(error, match=message):
        get_peft_model(build("llama"), IntrinsicConfig(d=40, trainable_token_indices=indices))


def test_an_embedding_cannot_be_adapted_by_p_and_have_trained_rows():
    model, plain = build("llama"), evaluate(build("llama"), "llama")
    with pytest.raises(ValueError, match=r"exclude_modules=\['model.embed_tokens'\]"):
        get_peft_model(model, IntrinsicConfig(d=40, target_modules="all", trainable_token_indices=[1]))
    assert torch.equal(evaluate(model, "llama"), plain)
    assert not any("token_adapter" in name for name, _ in model.named_modules())


def test_an_adapter_without_token_rows_joins_one_that_has_them():
    model = tuned("gpt2", [2, 5])  # tied: PEFT would look for the rows of the second adapter
    expected = logits(model)
    model.add_adapter("plain", IntrinsicConfig(d=40))
    assert torch.equal(logits(model), expected)
    model.set_adapter("plain")
    assert torch.equal(logits(model), logits(build("gpt2")))
    model.set_adapter("default")
    model.delete_adapter("plain")
    assert torch.equal(logits(model), expected)
