"""Attached training of transformers' models against dense training; what they save is what they would save anyway."""

import copy
import fnmatch

import pytest
import torch
from attached import VOCABULARY, distance, hf_loss, train

from mofasgd import MoFaSGD, param_groups

transformers = pytest.importorskip("transformers")

SMALL = {"vocab_size": VOCABULARY}
DECODER = {
    **SMALL,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER))


def qwen2():
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**DECODER, tie_word_embeddings=True))


def gpt2():
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
    none = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**SMALL, **sizes, **none))


def bert():
    sizes = {k: v for k, v in DECODER.items() if k != "num_key_value_heads"}
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return transformers.BertForMaskedLM(transformers.BertConfig(**sizes, **none))


# model, and a factored parameter of each mode
MODELS = {
    "llama": (llama, {"model.layers.0.mlp.down_proj.weight": "sketch", "lm_head.weight": "sketch"}),
    "qwen2": (qwen2, {"model.layers.0.self_attn.q_proj.weight": "sketch", "model.embed_tokens.weight": "sketch"}),
    "gpt2": (gpt2, {"transformer.h.0.mlp.c_fc.weight": "release", "transformer.wte.weight": "sketch"}),
    "bert": (bert, {"bert.encoder.layer.0.attention.self.query.weight": "sketch"}),
}
EMBEDDINGS = ("*embed_tokens.weight", "*wte.weight", "*word_embeddings.weight", "lm_head.weight")


def embeddings_of(model):
    names = [name for name, _ in model.named_parameters()]
    return [pattern for pattern in EMBEDDINGS if fnmatch.filter(names, pattern)]


@pytest.mark.parametrize("max_grad_norm", [None, 0.3])
@pytest.mark.parametrize("name", MODELS)
def test_twenty_steps_of_four_micro_batches_equal_dense_training(name, max_grad_norm):
    make, modes = MODELS[name]
    start = make()
    options = {"loss": hf_loss, "factor": embeddings_of(start), "max_grad_norm": max_grad_norm}
    dense, opt = train(start, None, **options)
    for mode in ("auto", "release"):
        attached, other = train(start, mode, **options)
        # As for the project's GPT: rounding of sketches, amplified by the gaps of their spectrum.
        assert distance(attached, dense, start) <= 1e-4
        assert other.grad_norm().item() == pytest.approx(opt.grad_norm().item(), rel=1e-5)
        assert all(p.grad is None for p in attached.parameters() if p.ndim == 2 and min(p.shape) > 4)
        if mode == "auto":
            found = {row.name: row.mode for row in other._handle.rows}
            assert {key: found[key] for key in modes} == modes


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_as_the_trainer_switches_it_on(name, reentrant):
    start = MODELS[name][0]()
    dense, _ = train(start, None, loss=hf_loss, steps=3)
    start.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    start.enable_input_require_grads()
    assert any(getattr(m, "gradient_checkpointing", False) and m.training for m in copy.deepcopy(start).modules())
    attached, _ = train(start, "auto", loss=hf_loss, steps=3)
    assert distance(attached, dense, start) <= 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_what_is_saved_is_what_an_unattached_model_saves(name, tmp_path):
    model = MODELS[name][0]()
    plain = copy.deepcopy(model)
    opt = MoFaSGD(param_groups(model, rank=4, lr=0.02))
    with opt.attach(model):
        hf_loss(model, torch.randint(0, VOCABULARY, (2, 17))).backward()
        assert list(model.state_dict()) == list(plain.state_dict())
        for which, path in ((model, "attached"), (plain, "plain")):
            which.save_pretrained(tmp_path / path)
    files = {p.name: p.read_bytes() for p in (tmp_path / "plain").iterdir()}
    assert {p.name: p.read_bytes() for p in (tmp_path / "attached").iterdir()} == files
    assert type(model) is type(plain)
    again = type(plain).from_pretrained(tmp_path / "attached")
    assert all(torch.equal(p, q) for p, q in zip(again.parameters(), plain.parameters(), strict=True))


def test_generation_and_recorded_states_are_unchanged():
    model = llama().eval()
    tokens = torch.randint(0, VOCABULARY, (2, 5))
    options = {"max_new_tokens": 5, "do_sample": False}
    expected = model.generate(tokens, **options), model(tokens, output_hidden_states=True).hidden_states
    opt = MoFaSGD(param_groups(model, rank=4, lr=0.02))
    opt.attach(model)
    found = model.generate(tokens, **options), model(tokens, output_hidden_states=True).hidden_states
    assert torch.equal(expected[0], found[0])
    assert len(expected[1]) == len(found[1]) == 3
    assert all(torch.equal(a, b) for a, b in zip(expected[1], found[1], strict=True))
