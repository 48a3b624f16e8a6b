"""Models of transformers train one step equal to the single device, in float64.

GPT-2, Llama and BERT under random strategies; and as they come, with dropout, caches and checkpoints, on simulated and real
ranks: those, mixtures of experts, encoders with decoders, and a transformer of images.
"""

from __future__ import annotations

import copy
import logging
import os
import random
import warnings

import jobs
import pytest
import torch
import torch.nn.functional as F

import shardwright as sw

transformers = pytest.importorskip("transformers")
logging.getLogger("transformers").setLevel(logging.ERROR)

WORDS, LENGTH, BATCH = 60, 8, 4


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=WORDS, n_positions=16, n_embd=24, n_layer=2, n_head=4, use_cache=False, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


def llama():
    config = transformers.LlamaConfig(
        vocab_size=WORDS, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=16, use_cache=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def bert():
    config = transformers.BertConfig(
        vocab_size=WORDS, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=16,
    )  # fmt: skip
    return transformers.BertForMaskedLM(config)


MODELS = {"gpt2": gpt2, "llama": llama, "bert": bert}


def float64_norm(self, hidden_states):
    """Llama's own norm rounds to float32 inside, where no two orders of summation agree to float64."""
    variance = hidden_states.pow(2).mean(-1, keepdim=True)
    return self.weight * hidden_states * torch.rsqrt(variance + self.variance_epsilon)


def counts(rng, shape, devices):
    result, left = [1] * len(shape), devices
    for dim in rng.choices(range(len(shape)), k=2):
        factor = rng.choice([k for k in range(1, left + 1) if left % k == 0])
        result[dim] *= factor
        left //= factor
    return tuple(result)


def random_strategies(rng, model, ids, devices):
    """Random slice counts for the inputs and the parameters of about half of the leaf modules."""
    shapes = {}
    hooks = [
        module.register_forward_hook(
            lambda m, inputs, out, name=name: shapes.update({name: [t.shape for t in inputs if torch.is_tensor(t)]})
        )
        for name, module in model.named_modules()
    ]
    with torch.no_grad():
        model(input_ids=ids)
    for hook in hooks:
        hook.remove()
    strategies = {}
    for name, module in model.named_modules():
        if not name or list(module.children()) or rng.random() < 0.5 or not shapes.get(name):
            continue
        plan = {n: counts(rng, p.shape, devices) for n, p in module.named_parameters() if rng.random() < 0.5}
        strategies[name] = {
            "in_strategy": tuple(counts(rng, shape, devices) for shape in shapes[name]),
            "parameter_plan": plan or None,
        }
    return strategies


@pytest.mark.parametrize("devices", [2, 4, 6, 8])
@pytest.mark.parametrize("name", MODELS)
def test_random_strategies(name, devices, monkeypatch):
    monkeypatch.setattr(transformers.models.llama.modeling_llama.LlamaRMSNorm, "forward", float64_norm)
    rng = random.Random(devices)
    torch.manual_seed(0)
    model = MODELS[name]().double().eval()
    ids = torch.randint(0, WORDS, (BATCH, LENGTH))

    def loss_of(call):
        logits = call(input_ids=ids).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    expected = loss_of(model)
    expected.backward()
    gradients = {n: p.grad for n, p in model.named_parameters()}
    model.zero_grad()
    sw.init(devices=devices)
    net = sw.AutoParallel(model).shard(random_strategies(rng, model, ids, devices))
    loss = loss_of(net)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-10)
    largest = max(float(g.abs().max()) for g in gradients.values())
    for n, parameter in model.named_parameters():
        # a gradient that is zero by cancellation (BERT's key bias) is rounding alone
        scale = float(gradients[n].abs().max()) + 1e-4 * largest
        assert float((parameter.grad - gradients[n]).abs().max()) <= 1e-10 * scale, n


def test_dropout_of_a_whole_model_is_the_single_devices():
    torch.manual_seed(0)
    model = gpt2().double().train()
    ids = torch.randint(0, WORDS, (BATCH, LENGTH))
    torch.manual_seed(1)
    expected = model(input_ids=ids).logits
    for devices in (2, 3):
        sw.init(devices=devices)
        torch.manual_seed(1)
        torch.testing.assert_close(sw.AutoParallel(model)(input_ids=ids).logits, expected, rtol=1e-10, atol=1e-12)


# -- as they come -----------------------------------------------------------------------------------------------------------

SPECIAL = {"vocab_size": WORDS, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
DECODER = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}  # fmt: skip


def as_it_comes(name):
    """A small model with its defaults: dropout and caches are on."""
    t = transformers
    if name == "gpt2":
        return t.GPT2LMHeadModel(t.GPT2Config(n_positions=16, n_embd=16, n_layer=2, n_head=2, **SPECIAL))
    if name == "llama":
        return t.LlamaForCausalLM(t.LlamaConfig(**DECODER, **SPECIAL))
    if name == "mixtral":
        config = t.MixtralConfig(num_local_experts=4, num_experts_per_tok=2, output_router_logits=True, **DECODER, **SPECIAL)
        model = t.MixtralForCausalLM(config)
        model.set_experts_implementation("batched_mm")  # the default one knows no float64
        return model
    if name == "t5":
        sizes = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4}
        return t.T5ForConditionalGeneration(t.T5Config(vocab_size=WORDS, decoder_start_token_id=0, **sizes))
    if name == "bart":
        sides = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in SIDE.items()}
        config = t.BartConfig(d_model=16, max_position_embeddings=32, decoder_start_token_id=0, **sides, **SPECIAL)
        return t.BartForConditionalGeneration(config)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    if name == "wav2vec2":  # checks its labels, drops layers at random, aligns by a CTC loss
        layers = {"conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2}
        layers |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "layerdrop": 0.5}
        return t.Wav2Vec2ForCTC(t.Wav2Vec2Config(vocab_size=12, apply_spec_augment=False, pad_token_id=0, **layers, **sizes))
    if name == "detr":  # clamps what is not finite
        backbone = t.ResNetConfig(
            embedding_size=8, hidden_sizes=[8] * 4, depths=[1] * 4, layer_type="basic", out_features=["stage4"]
        )
        sides = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in SIDE.items()}
        return t.DetrForObjectDetection(
            t.DetrConfig(
                use_timm_backbone=False,
                backbone=None,
                backbone_config=backbone,
                d_model=16,
                num_queries=5,
                num_labels=3,
                **sides,
            )
        )
    return t.ViTForImageClassification(t.ViTConfig(image_size=8, patch_size=4, num_labels=5, **sizes))


SIDE = {"layers": 2, "attention_heads": 2, "ffn_dim": 24}
AS_THEY_COME = ("gpt2", "llama", "mixtral", "t5", "bart", "vit")
DECIDE = ("wav2vec2", "detr")  # by values of tensors
CHECKPOINTS = {"kept": None, "reentrant": True, "checkpointed": False}
ALL = os.environ.get("SHARDWRIGHT_TEST_ALL") == "1"


def some(world):
    """Each model in one of the ways of keeping what the backward needs; in all of them with ``make test-all``."""
    ways = list(CHECKPOINTS)
    return [(name, way) for at, name in enumerate(AS_THEY_COME) for way in (ways if ALL else [ways[(at + world) % 3]])]


def inputs_of(name):
    if name == "vit":
        return {"pixel_values": torch.randn(BATCH, 3, 8, 8).double(), "labels": torch.randint(5, (BATCH,))}
    if name == "wav2vec2":
        labels = torch.randint(1, 12, (BATCH, 6)).masked_fill(torch.arange(6) > torch.arange(BATCH)[:, None] + 1, -100)
        return {"input_values": torch.randn(BATCH, 300).double(), "labels": labels}
    if name == "detr":
        return {"pixel_values": torch.randn(BATCH, 3, 32, 32).double()}
    ids = torch.randint(2, WORDS, (BATCH, 6))
    return {"input_ids": ids, "labels": torch.randint(2, WORDS, (BATCH, 5)) if name in ("t5", "bart") else ids}


def check_as_it_comes(name, way):
    torch.manual_seed(0)
    model = as_it_comes(name).double().train()
    inputs = inputs_of(name)
    if CHECKPOINTS[way] is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": CHECKPOINTS[way]})
    single, found = copy.deepcopy(model), []
    for call in (single, sw.AutoParallel(model, "data_parallel")):
        torch.manual_seed(1)  # the same dropout
        found.append(call(**inputs))
        if found[-1].get("loss") is None:
            found[-1].loss = found[-1].logits.square().mean() + found[-1].pred_boxes.sum()
        found[-1].loss.backward()
    expected, got = found
    assert type(got) is type(expected)
    assert list(got) == list(expected)
    torch.testing.assert_close(got.loss, expected.loss, rtol=1e-6, atol=0)  # most compute their loss in float32
    largest = max(p.grad.abs().max() for p in single.parameters() if p.grad is not None)
    for (label, p), q in zip(model.named_parameters(), single.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), label
        if q.grad is not None:
            assert (sw.full_value(p.grad) - q.grad).abs().max() < 1e-12 * largest, label


def check_caches(name):
    """What a call returns in its cache; sentences continued without it; a cache that is handed in."""
    torch.manual_seed(0)
    model = as_it_comes(name).double().eval()
    single, net, ids = copy.deepcopy(model), sw.AutoParallel(model), inputs_of(name)["input_ids"]
    sentences = []
    for call in (single, net):
        found = ids[:, :2]
        for _ in range(3):
            given = {"input_ids": found} if name == "gpt2" else {"input_ids": ids, "decoder_input_ids": found}
            with torch.no_grad():
                result = call(**given)
            found = torch.cat([found, result.logits[:, -1:].argmax(-1)], 1)
        sentences.append((found, result.past_key_values))
    (expected, cache), (got, own) = sentences
    assert torch.equal(got, expected)
    assert type(own) is type(cache)
    assert own.get_seq_length() == cache.get_seq_length()
    with pytest.raises(sw.errors.CaptureError, match="is handed in, which a call changes in place"):
        net(**{**given, "past_key_values": own})


@pytest.fixture
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch and transformers of checkpoints
        yield


@pytest.mark.whole
@pytest.mark.usefixtures("_quiet")
@pytest.mark.parametrize(("name", "way"), some(0))
def test_as_it_comes(name, way, monkeypatch):
    monkeypatch.setattr("shardwright.world.current._current", [])
    sw.init(devices=3)
    check_as_it_comes(name, way)


@pytest.mark.whole
@pytest.mark.usefixtures("_quiet")
@pytest.mark.parametrize("name", DECIDE)
def test_what_decides_by_values(name, monkeypatch):
    monkeypatch.setattr("shardwright.world.current._current", [])
    sw.init(devices=3)
    check_as_it_comes(name, "kept")


@pytest.mark.whole
@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_caches(name, monkeypatch):
    monkeypatch.setattr("shardwright.world.current._current", [])
    sw.init(devices=2)
    check_caches(name)


def everything(rank):
    sw.init()
    for name, way in some(1) if ALL else some(1)[1::2]:
        check_as_it_comes(name, way)
    if ALL:
        for name in DECIDE:
            check_as_it_comes(name, "kept")
    check_caches("gpt2")
    print("reached the end")


@pytest.mark.whole
def test_as_they_come_on_real_ranks(tmp_path):
    for ended in jobs.run(tmp_path, 2, everything, seconds=300):
        assert ended.code == 0, ended.text[-3000:]
        assert "reached the end" in ended.text
