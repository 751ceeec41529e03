"""Batches in which every sample has its own adapter: as each sample alone."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from conftest import batch, build, evaluate, output, trained
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import (
    BartConfig,
    BartModel,
    BertConfig,
    BertForMultipleChoice,
    CLIPVisionConfig,
    DebertaV2Config,
    DebertaV2Model,
    DynamicCache,
    FSMTConfig,
    FSMTModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LongformerConfig,
    LongformerModel,
    XLNetConfig,
    XLNetModel,
)

from peft_intrinsic import AdapterBank, IntrinsicConfig

CLOSE = {"rtol": 1e-4, "atol": 2e-5}
MIXABLE = ["bert", "gpt2", "llama", "gemma", "qwen2", "roberta", "distilbert", "electra", "bart", "t5", "whisper"]
LEFT_OUT = {
    "t5": ".*relative_attention_bias",
    "bart": ".*embed_positions",
    "whisper": r".*(conv\d|embed_positions)",
}


def several(name: str, **options) -> PeftModel:
    """Three adapters of one projection, a fourth of another."""
    common = {"d": 60, "init_weights": False, "target_modules": "all", "exclude_modules": LEFT_OUT.get(name), **options}
    model = get_peft_model(build(name), IntrinsicConfig(**common))
    for adapter in ("second", "third"):
        model.add_adapter(adapter, IntrinsicConfig(**common))
    model.add_adapter("other", IntrinsicConfig(**{**common, "d": 31, "seed": 4, "said": True}))
    generator = torch.Generator().manual_seed(0)
    for vectors in (
        model.get_base_model().intrinsic.intrinsic_theta,
        model.get_base_model().intrinsic.intrinsic_lambda,
    ):
        for vector in vectors.values():
            vector.weight.data = torch.randn(vector.weight.shape, generator=generator) / 500
    return model.eval()


def one(name: str, i: int) -> dict[str, torch.Tensor]:
    return {key: value[i : i + 1] for key, value in batch(name).items()}


@torch.no_grad()
def alone(model: PeftModel, name: str, adapters: list[str]) -> torch.Tensor:
    """Every sample by itself, with its adapter active."""
    results = []
    for i, adapter in enumerate(adapters):
        if adapter == "__base__":
            with model.disable_adapter():
                results.append(output(model, one(name, i)))
        else:
            model.set_adapter(adapter)
            results.append(output(model, one(name, i)))
    model.set_adapter("default")
    return torch.cat(results)


@pytest.mark.slow
@pytest.mark.parametrize("name", MIXABLE)
@pytest.mark.parametrize("said", [False, True])
def test_adapter_names_gives_each_sample_its_adapter(name, said):
    model = several(name, said=said)
    adapters = ["third", "__base__", "other", "default"]
    expected = alone(model, name, adapters)
    with torch.no_grad():
        found = output(model, {**batch(name), "adapter_names": adapters})
    torch.testing.assert_close(found, expected, **CLOSE)
    assert (found - evaluate(model, name)).abs().max() > 1e-3


@pytest.mark.parametrize("name", MIXABLE)
def test_a_bank_gives_each_sample_its_adapter(name):
    model = several(name, said=True)
    vector = model.get_base_model().intrinsic
    bank = AdapterBank(model, torch.stack([vector.concatenate(a) for a in ("third", "default", "second")]))
    expected = alone(model, name, ["second", "third", "__base__", "third"])
    with bank.select([2, 0, -1, 0]):
        torch.testing.assert_close(evaluate(model, name), expected, **CLOSE)
    torch.testing.assert_close(evaluate(model, name), alone(model, name, ["default"] * 4), **CLOSE)


@pytest.mark.parametrize("projection", ["fastfood", "dense"])
def test_a_bank_works_with_every_projection_and_target(projection):
    for targets in (None, "all-linear", ["embed_tokens"], ["norm", "input_layernorm"]):
        model = several("llama", projection=projection, target_modules=targets)
        adapters = ["third", "__base__", "other", "default"]
        with torch.no_grad():
            found = output(model, {**batch("llama"), "adapter_names": adapters})
        torch.testing.assert_close(found, alone(model, "llama", adapters), **CLOSE)


class OneInput(nn.Module):
    """Adds to every sample what a linear layer makes of one input for all of them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.layer(torch.ones(1, *x.shape[1:]))


@pytest.mark.parametrize("last", [nn.RMSNorm, nn.LayerNorm, partial(nn.LayerNorm, bias=False), OneInput])
def test_modules_of_torch_can_be_mixed(last):
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(6, 6), last(6)), IntrinsicConfig(d=10)).eval()
    bank = AdapterBank(model, torch.randn(3, 10) / 500)
    x = torch.randn(1, 5, 6).repeat(2, 1, 1)  # only the adapters differ
    with torch.no_grad():
        with bank.select([2, 0]):
            found = model(x)
        for row, i in zip(found, (2, 0), strict=True):
            model.base_model.vector.intrinsic_theta["default"].weight.copy_(bank.vectors[i])
            torch.testing.assert_close(row, model(x)[0], **CLOSE)
    assert (found[0] - found[1]).abs().max() > 1e-2


@pytest.mark.parametrize("grad", [True, False])
def test_vmap_over_many_vectors_equals_a_loop(grad):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6))
    model = get_peft_model(base, IntrinsicConfig(d=50, target_modules="all"))
    ((name, theta),) = ((n, p) for n, p in model.named_parameters() if p.requires_grad)
    thetas, x = torch.randn(3, 50) / 500, torch.randn(4, 6)
    with torch.set_grad_enabled(grad):
        found = torch.func.vmap(lambda one: torch.func.functional_call(model, {name: one}, (x,)))(thetas)
        for result, one in zip(found, thetas, strict=True):
            theta.data.copy_(one)
            torch.testing.assert_close(result, model(x), **CLOSE)


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bart"])
def test_each_sample_generates_with_its_adapter(name, how):
    model = several(name)
    ids = batch(name)["input_ids"]
    fixed = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": 1, **how}
    adapters = ["third", "__base__", "second", "default"]
    found = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), adapter_names=adapters, **fixed
    ).unflatten(0, (4, -1))
    for i, adapter in enumerate(adapters):
        sample = {"input_ids": ids[i : i + 1], "attention_mask": torch.ones_like(ids[i : i + 1])}
        if adapter == "__base__":
            with model.disable_adapter():
                expected = model.generate(**sample, **fixed)
        else:
            model.set_adapter(adapter)
            expected = model.generate(**sample, **fixed)
        assert torch.equal(found[i], expected)
    assert not torch.equal(found[0], found[1])


def test_a_bank_loads_saved_adapters(tmp_path):
    model = several("bert", said=True)
    model.save_pretrained(tmp_path, selected_adapters=["default", "second", "third", "other"])
    paths = [str(tmp_path), str(tmp_path / "third")]
    served = PeftModel.from_pretrained(build("bert"), tmp_path).eval()
    bank = AdapterBank.from_pretrained(served, paths)
    assert bank.vectors.shape == (2, 60)
    with bank.select([1, 0, -1, 1]):
        found = evaluate(served, "bert")
    torch.testing.assert_close(found, alone(model, "bert", ["third", "default", "__base__", "third"]), **CLOSE)
    with pytest.raises(ValueError, match=r"other cannot join the bank.*d \(60 and 31\).*seed \(0 and 4\)"):
        AdapterBank.from_pretrained(served, [*paths, str(tmp_path / "other")])


def test_modules_to_save_follow_the_sample():
    model = several("bert", modules_to_save=["classifier"], task_type="SEQ_CLS")
    for i, wrapped in enumerate(model.get_base_model().classifier.modules_to_save.values()):
        wrapped.weight.data.add_(0.1 * i)
    adapters = ["third", "__base__", "other", "default"]
    with torch.no_grad():
        found = output(model, {**batch("bert"), "adapter_names": adapters})
    torch.testing.assert_close(found, alone(model, "bert", adapters), **CLOSE)


@pytest.mark.parametrize("options", [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": list(range(40))}])
def test_an_adapter_without_modules_to_save_uses_those_of_the_base_model(options):
    model = trained("llama", target_modules=["q_proj"], **options)
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name or "trainable_tokens_delta" in name:
            parameter.data.add_(0.1)
    model.add_adapter("plain", IntrinsicConfig(d=30, target_modules=["v_proj"], init_weights=False))
    adapters = ["plain", "default", "__base__", "plain"]
    with torch.no_grad():
        found = output(model, {**batch("llama"), "adapter_names": adapters})
    torch.testing.assert_close(found, alone(model, "llama", adapters), **CLOSE)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit", "cls_token.*projection.weight.*exclude_modules"),
        ("t5", "relative_attention_bias.weight.*exclude_modules"),
        ("moe", "experts.*exclude_modules"),
    ],
)
def test_modules_that_cannot_be_mixed_are_listed(name, message):
    model = trained(name)
    with pytest.raises(ValueError, match=message):
        model(**batch(name), adapter_names=["default"] * 4)
    with pytest.raises(ValueError, match=message):
        AdapterBank(model, torch.zeros(3, 200))


def test_invalid_choices_raise():
    model = several("bert")
    names = ["default"] * 4
    with pytest.raises(ValueError, match=r"non-existing adapter\(s\): absent"):
        model(**batch("bert"), adapter_names=["absent", *names[1:]])
    for short in (names[:3], names[:2]):
        with pytest.raises(ValueError, match=f"but got {len(short)} and 4 respectively"):
            model(**batch("bert"), adapter_names=short)
    with pytest.raises(ValueError, match=r"shape \[K, 60\].*\(2, 61\)"):
        AdapterBank(model, torch.zeros(2, 61))
    bank = AdapterBank(model, torch.zeros(2, 60))
    with pytest.raises(ValueError, match=r"chosen for 3 samples.*shape"), bank.select([0, 1, 0]):
        evaluate(model, "bert")
    for index in ([0, 2], [-2], [[0]]):
        with pytest.raises(IndexError, match="−1 to 1"), bank.select(index):
            pass
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        model(**batch("bert"), adapter_names=names)
    model.unmerge_adapter()
    model.train()
    with pytest.raises(ValueError, match="training mode"):
        model(**batch("bert"), adapter_names=names)


def test_a_bank_of_an_unknown_adapter_raises():
    with pytest.raises(ValueError, match=r"adapter='nope' is not attached. Attached are \['default'\]"):
        AdapterBank(
            get_peft_model(build("bert"), IntrinsicConfig(d=20, task_type="SEQ_CLS")), torch.zeros(2, 20), "nope"
        )


def test_a_choice_applies_to_its_own_thread_and_ends():
    """During it, a thread without a choice gets an error; afterwards, all use the active adapter."""
    model = trained("bert")
    expected = evaluate(model, "bert")
    bank = AdapterBank(model, torch.zeros(1, 200))
    with ThreadPoolExecutor(1) as pool:
        with bank.select([0] * 4), pytest.raises(RuntimeError, match="not in this thread or coroutine"):
            pool.submit(evaluate, model, "bert").result()
        assert torch.equal(pool.submit(evaluate, model, "bert").result(), expected)


class Positions(nn.Module):
    """nanoGPT's way: positions `[tokens]`, looked up once for all samples."""

    def __init__(self, first: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wte, self.wpe, self.out, self.first = nn.Embedding(20, 8), nn.Embedding(9, 8), nn.Linear(8, 5), first

    def forward(self, index: torch.Tensor) -> torch.Tensor:
        x = self.wte(index) + self.wpe(torch.arange(index.shape[1]))
        return self.out(x) if self.first else self.out(x.transpose(0, 1)).transpose(0, 1)


@pytest.mark.parametrize("tokens", [3, 4, 8])
@pytest.mark.parametrize("first", [True, False])
def test_modules_give_samples_their_own_adapters_where_they_are_batch_first_and_raise_elsewhere(tokens, first):
    """Also where a length happens to equal the size of the batch, or is a multiple of it."""
    index = torch.randint(20, (4, tokens), generator=torch.Generator().manual_seed(0))
    for targets, sound in ((["wpe"], False), (["out"], first), (["wte"], True)):
        model = get_peft_model(Positions(first), IntrinsicConfig(d=20, target_modules=targets)).eval()
        bank = AdapterBank(model, torch.randn(3, 20, generator=torch.Generator().manual_seed(1)) / 500)
        with torch.no_grad(), bank.select([2, 0, -1, 1]):
            if sound:
                found = model(index)
            else:
                with pytest.raises(ValueError, match=rf"layer of {targets[0]}.* may not be the batch.*exclude_modules"):
                    model(index)
        for i, adapter in enumerate([2, 0, -1, 1] if sound else []):
            with torch.no_grad(), bank.select([adapter]):
                torch.testing.assert_close(found[i : i + 1], model(index[i : i + 1]), **CLOSE)


def test_transformers_models_are_batch_first():
    """Even where the sequences are as long as the batch is large."""
    model = several("llama")
    bank = AdapterBank(model, torch.randn(3, 60, generator=torch.Generator().manual_seed(1)) / 500)
    ids = batch("llama")["input_ids"][:, :4]
    with torch.no_grad(), bank.select([2, 0, -1, 1]):
        found = output(model, {"input_ids": ids})
    for i, adapter in enumerate([2, 0, -1, 1]):
        with torch.no_grad(), bank.select([adapter]):
            torch.testing.assert_close(found[i : i + 1], output(model, {"input_ids": ids[i : i + 1]}), **CLOSE)


def test_a_weight_that_another_module_reads_cannot_be_mixed():
    class Reader(Positions):
        def forward(self, index: torch.Tensor) -> torch.Tensor:
            return self.wte(index) @ self.wte.weight.T

    model = get_peft_model(Reader(), IntrinsicConfig(d=20, target_modules=["wte"])).eval()
    bank = AdapterBank(model, torch.ones(3, 20))
    with torch.no_grad(), bank.select([0, 1]), pytest.raises(ValueError, match=r"wte.weight is read by another module"):
        model(torch.zeros(2, 7, dtype=torch.long))


SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
SEQ2SEQ = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
SEQ2SEQ |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
LAYOUTS = {  # whether all linear layers get the samples first
    "FSMT": (False, lambda: FSMTModel(FSMTConfig(langs=["en", "de"], src_vocab_size=60, tgt_vocab_size=60, **SEQ2SEQ))),
    "Longformer": (
        False,
        lambda: LongformerModel(
            LongformerConfig(vocab_size=60, attention_window=2, max_position_embeddings=32, **SMALL)
        ),
    ),
    "XLNet": (False, lambda: XLNetModel(XLNetConfig(vocab_size=60, d_model=32, n_layer=2, n_head=2, d_inner=64))),
    "BART": (True, lambda: BartModel(BartConfig(vocab_size=60, max_position_embeddings=32, **SEQ2SEQ))),
    "DeBERTa": (True, lambda: DebertaV2Model(DebertaV2Config(vocab_size=60, **SMALL))),
    "multiple choice": (False, lambda: BertForMultipleChoice(BertConfig(vocab_size=60, **SMALL))),
}


@pytest.mark.parametrize("tokens", [4, 6])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_sample_gets_its_own_adapter_or_the_layer_is_listed_in_any_layout(layout, tokens):
    first, make = LAYOUTS[layout]
    torch.manual_seed(0)
    base = make()
    ids = torch.randint(3, 60, (4, tokens), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": ids[:, None].repeat(1, 2, 1) if layout == "multiple choice" else ids}
    if base.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids.flip(1)
    config = IntrinsicConfig(d=40, target_modules="all-linear", init_weights=False)
    model = get_peft_model(base, config).eval()
    model.add_adapter("b", IntrinsicConfig(d=40, target_modules="all-linear", init_weights=False))
    names = ["default", "b", "b", "default"]
    with torch.no_grad():
        if not first:
            with pytest.raises(
                ValueError, match=r"Adapters were chosen for 4 samples, but the layer of .*exclude_modules"
            ):
                model(**inputs, adapter_names=names)
            return
        mixed, alone = model(**inputs, adapter_names=names)[0], {}
        for name in set(names):
            model.set_adapter(name)
            alone[name] = model(**inputs)[0]
    assert not torch.allclose(alone["default"], alone["b"], atol=1e-2)
    torch.testing.assert_close(mixed, torch.stack([alone[name][i] for i, name in enumerate(names)]), **CLOSE)


class Experts(nn.Module):
    """Hands each expert the tokens that a router chose, which can be as many as there are samples."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.expert = nn.Embedding(20, 8), nn.Linear(8, 8)

    def forward(self, index):
        x = self.embedding(index)
        return x.masked_scatter((index < 10)[..., None], self.expert(x[index < 10]))


def test_a_subset_of_the_tokens_is_not_taken_for_the_samples():
    model = get_peft_model(Experts(), IntrinsicConfig(d=20, target_modules=["expert"])).eval()
    bank = AdapterBank(model, torch.randn(3, 20, generator=torch.Generator().manual_seed(1)) / 500)
    index = torch.tensor([[1, 2, 15], [11, 3, 12], [17, 18, 4], [14, 13, 16]])  # four chosen tokens in four samples
    with torch.no_grad(), bank.select([2, 0, -1, 1]), pytest.raises(ValueError, match="layer of expert"):
        model(index)


def llava():
    vision, text = CLIPVisionConfig(**SMALL, image_size=8, patch_size=4), LlamaConfig(**SMALL, vocab_size=60)
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=59, vision_feature_layer=-1)
    )


def test_images_are_not_samples_and_the_text_part_can_be_mixed():
    ids = torch.randint(3, 50, (2, 14), generator=torch.Generator().manual_seed(1))
    ids[0, 1:5] = ids[0, 6:10] = 59  # two images of four patches, both in the first sample
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    options = {"d": 40, "init_weights": False}
    for targets, named in (
        (["q_proj", "v_proj"], "vision_tower.encoder"),
        (["linear_1"], "multi_modal_projector.linear_1"),
    ):
        model = get_peft_model(llava(), IntrinsicConfig(target_modules=targets, **options)).eval()
        with pytest.raises(ValueError, match=f"LlavaForConditionalGeneration takes several kinds of input.*{named}"):
            model(input_ids=ids, pixel_values=images, adapter_names=["default", "__base__"])
        with pytest.raises(ValueError, match=named):
            AdapterBank(model, torch.zeros(1, 40))
    inside = nn.Sequential(llava())  # also in a module of the user's
    inside.forward = lambda **inputs: inside[0](**inputs)
    model = get_peft_model(inside, IntrinsicConfig(target_modules=["q_proj"], **options)).eval()
    with pytest.raises(ValueError, match=r"takes several kinds of input.*vision_tower"):
        model(input_ids=ids, pixel_values=images, adapter_names=["default", "__base__"])
    config = {"target_modules": r".*language_model.*(q_proj|v_proj)|lm_head", **options}
    model = get_peft_model(llava(), IntrinsicConfig(**config)).eval()
    model.add_adapter("b", IntrinsicConfig(**config))
    with torch.no_grad():
        mixed, alone = model(input_ids=ids, pixel_values=images, adapter_names=["b", "default"]).logits, []
        for i, name in enumerate(["b", "default"]):
            model.set_adapter(name)
            alone.append(model(input_ids=ids, pixel_values=images).logits[i])
    torch.testing.assert_close(mixed, torch.stack(alone), **CLOSE)


class Levels(nn.Module):
    """Hands its layer two levels of detail as the first axis, in whatever form its input comes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(8, 8)

    def forward(self, inputs, lengths=None):
        x = torch.stack(list(inputs.values()) if isinstance(inputs, dict) else list(inputs))
        x = x if lengths is None else x * lengths[:, None, None]
        return self.layer(torch.stack([x, x / 2]).flatten(1, 2))


@pytest.mark.parametrize("lengths", [False, True])
@pytest.mark.parametrize("form", [list, dict])
def test_no_form_of_input_lets_another_axis_pass_for_the_samples(form, lengths):
    model = get_peft_model(Levels(), IntrinsicConfig(d=20, target_modules=["layer"])).eval()
    bank = AdapterBank(model, torch.randn(2, 20, generator=torch.Generator().manual_seed(1)) / 500)
    samples = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(2)).unbind()
    inputs = dict(zip("ab", samples, strict=True)) if form is dict else list(samples)
    with bank.select([0, 1]), pytest.raises(ValueError, match=r"layer of layer\.weight"):
        model(inputs, lengths=torch.tensor([1.0, 2.0]) if lengths else None)


def test_a_sequence_first_encoder_of_torch_raises():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=False)
    model = get_peft_model(
        nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), IntrinsicConfig(d=20, target_modules=["linear1"])
    ).eval()
    bank = AdapterBank(model, torch.zeros(2, 20))
    with bank.select([0, 1]), torch.enable_grad(), pytest.raises(ValueError, match="linear1"):
        model(torch.randn(2, 2, 8))


def test_rows_that_repeat_the_batch_as_a_whole_raise_and_beams_follow_their_sample():
    """Guidance without a classifier doubles a batch: its second half is not the second sample's."""
    model = several("llama")
    bank = AdapterBank(model, torch.randn(2, 60, generator=torch.Generator().manual_seed(1)) / 500)
    ids = batch("llama")["input_ids"][:2]
    with torch.no_grad(), bank.select([0, 1]):
        with pytest.raises(ValueError, match="one adapter for each row"):
            model(input_ids=torch.cat([ids, ids]))
        with bank.select([0, 1, 0, 1]):
            twice = model(input_ids=torch.cat([ids, ids])).logits
        torch.testing.assert_close(twice[:2], model(input_ids=ids).logits, **CLOSE)
        assert len(model.generate(input_ids=ids, num_beams=2, max_new_tokens=2, pad_token_id=0)) == 2


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_generation_begins_with_as_many_tokens_as_samples(name):
    """The encoder runs before the model does."""
    model = several(name)
    ids = batch(name)["input_ids"][:, :4]
    names = ["default", "second", "third", "default"]
    how = {"max_new_tokens": 2, "min_new_tokens": 2, "do_sample": False, "return_dict_in_generate": True}
    how["output_scores"] = True
    mixed = model.generate(input_ids=ids, adapter_names=names, **how).scores[0]
    for i, adapter in enumerate(names):
        model.set_adapter(adapter)
        torch.testing.assert_close(mixed[i : i + 1], model.generate(input_ids=ids[i : i + 1], **how).scores[0], **CLOSE)


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.normalization, self.layer = nn.BatchNorm1d(8), nn.Linear(8, 8)

    def forward(self, x):
        return self.layer(self.normalization(x.mT).mT + torch.randn(8))


@pytest.mark.filterwarnings("ignore:Training updates the running statistics")
def test_the_proof_leaves_buffers_and_random_numbers_as_they_were():
    model = get_peft_model(Noisy(), IntrinsicConfig(d=20, target_modules=["layer"])).eval()
    model.base_model.model.normalization.train()
    bank, x, outputs = AdapterBank(model, torch.zeros(3, 20)), torch.randn(3, 4, 8), []
    for number in (1, 2):
        torch.manual_seed(0)
        with bank.select([0, 1, 2]):
            outputs.append(model(x))
        assert int(model.base_model.model.normalization.num_batches_tracked) == number
    torch.testing.assert_close(*outputs)


def test_a_cache_among_the_positional_arguments_is_not_filled_by_the_proof():
    model = several("llama")
    bank = AdapterBank(model, torch.zeros(4, 60))
    ids, cache = batch("llama")["input_ids"], DynamicCache()
    with torch.no_grad(), bank.select([0, 1, 2, 3]):
        model.base_model.model(ids, None, None, cache)
    assert cache.get_seq_length() == ids.shape[1]


def test_first_mixed_batches_of_several_threads_do_not_disturb_each_other():
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(3):
            model = several("llama")
            bank = AdapterBank(model, torch.randn(9, 60, generator=torch.Generator().manual_seed(1)) / 500)
            ids = batch("llama")["input_ids"]

            def logits(rows, bank=bank, model=model, ids=ids):
                with torch.no_grad(), bank.select(list(range(rows))):
                    return model(input_ids=ids[:rows]).logits

            with ThreadPoolExecutor(4) as pool:
                found = list(pool.map(logits, (1, 2, 3, 4)))
            for rows, each in enumerate(found, 1):
                torch.testing.assert_close(each, logits(rows), **CLOSE)
    finally:
        sys.setswitchinterval(interval)
