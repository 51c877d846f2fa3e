from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import GPT2Config, GPT2Model

from engine.errors import UsageError
from engine_kernels import convert
from recipes.lib.indextts import IGNORED, PRESETS, ConditioningEncoder, IndexTTS, IndexTTSConfig, load_base, read_state, shifted, tokens

pytestmark = pytest.mark.timeout(60)
TINY = PRESETS["tiny"]
BASE = 300
MONTHS = ["ጃንዩወሪ", "ፌብሩወሪ", "ማርች", "ኤፕሪል", "ሜይ", "ጁን", "ጁላይ", "ኦገስት"]
Batch = dict[str, Tensor]


def model(config: IndexTTSConfig = TINY, seed: int = 1) -> IndexTTS:
    torch.manual_seed(seed)
    return IndexTTS(config)


def converted(plain: IndexTTS) -> IndexTTS:
    convert(plain, {"text_embedding": BASE, "text_head": BASE})
    return plain


def pair(word: str) -> Batch:
    """Its bytes are text ids, half of them new ones; each byte gives two codes."""
    spelled = torch.tensor(list(word.encode()))
    generator = torch.Generator().manual_seed(len(word))
    conditions = torch.randn(TINY.conditions, TINY.width, generator=generator)
    text_ids = torch.where(spelled % 2 == 0, spelled, spelled + BASE)
    return {"text_ids": text_ids, "codes": (spelled % 64).repeat_interleave(2), "conditions": conditions, "emo": conditions.mean(dim=0)}


def batch_of(*words: str, padding: int = 0, extra: int = 0) -> Batch:
    """Padded with ``padding``, by ``extra`` more than it takes."""
    pairs = [pair(word) for word in words]
    batch = {name: torch.stack([one[name] for one in pairs]) for name in ("conditions", "emo")}
    for name, length in (("text_ids", "text_len"), ("codes", "code_len")):
        lengths = [len(one[name]) for one in pairs]
        batch[length] = torch.tensor(lengths)
        batch[name] = torch.full((len(pairs), max(lengths) + extra), padding)
        for row, one in zip(batch[name], pairs, strict=True):
            row[: len(one[name])] = one[name]
    return batch


def blank() -> Batch:
    length, none = torch.tensor([-1]), torch.zeros(1, 0, dtype=torch.int64)
    conditions = torch.zeros(1, TINY.conditions, TINY.width)
    return {"text_ids": none, "text_len": length, "codes": none, "code_len": length, "conditions": conditions, "emo": conditions[:, 0]}


def test_names_and_shapes_are_those_of_indextts():
    with torch.device("meta"):
        full = IndexTTS(PRESETS["full"])
    shapes = {name: tuple(value.shape) for name, value in full.state_dict().items()}
    assert shapes["text_embedding.weight"] == shapes["text_head.weight"] == (24_001, 1280)
    assert shapes["text_head.bias"] == (24_001,)
    assert shapes["mel_embedding.weight"] == shapes["mel_head.weight"] == (8194, 1280)
    assert shapes["text_pos_embedding.emb.weight"] == (602, 1280)
    assert shapes["mel_pos_embedding.emb.weight"] == (1818, 1280)
    assert shapes["speed_emb.weight"] == (2, 1280)
    assert shapes["emo_layer.weight"] == (1280, 1280)
    assert shapes["gpt.h.23.attn.c_attn.weight"] == (1280, 3840)
    assert shapes["gpt.h.23.mlp.c_proj.weight"] == (5120, 1280)
    assert shapes["conditioning_encoder.latents"] == (32, 1280)
    assert len(full.blocks) == 24
    assert not any(name.startswith(("gpt.wte", "gpt.wpe")) for name in shapes)


def test_the_trunk_is_gpt2():
    ours = model().gpt
    theirs = GPT2Model(GPT2Config(vocab_size=1, n_positions=16, n_embd=64, n_layer=2, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))
    torch.nn.init.zeros_(theirs.wpe.weight)
    for block in ours.h:
        torch.nn.init.normal_(block.mlp.c_fc.weight, std=0.25)  # large, or all kinds of GELU would agree
        torch.nn.init.normal_(block.mlp.c_proj.weight)
    assert set(theirs.load_state_dict(ours.state_dict(), strict=False).missing_keys) == {"wte.weight", "wpe.weight"}
    x_BLD = torch.randn(2, 16, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(x_BLD), theirs(inputs_embeds=x_BLD).last_hidden_state, atol=2e-5, rtol=2e-5)


def test_inputs_and_targets_are_shifted_by_one():
    ids, length = torch.tensor([[5, 6, 7], [8, -9, 10**6]]), torch.tensor([3, 1])
    inputs, targets, is_token = shifted(ids, length, 0, 1)
    assert inputs.tolist() == [[0, 5, 6, 7, 1], [0, 8, 1, 1, 1]]
    assert targets.tolist() == [[5, 6, 7, 1, IGNORED], [8, 1, IGNORED, IGNORED, IGNORED]]
    assert is_token.sum(dim=1).tolist() == [5, 3]


def test_padding_changes_nothing():
    network = model()
    with torch.no_grad():
        sums = network(batch_of(*MONTHS))
        assert torch.equal(network(batch_of(*MONTHS, padding=-7)), sums)
        torch.testing.assert_close(network(batch_of(*MONTHS, padding=10**6, extra=5)), sums)
        torch.testing.assert_close(sum(network(batch_of(word)) for word in MONTHS), sums)


def test_the_text_does_not_see_the_codes_and_the_codes_see_everything():
    network, batch = model(), batch_of(*MONTHS)
    for name, changed in (("codes", [False, True]), ("text_ids", [True, True]), ("emo", [True, True]), ("conditions", [True, True])):
        with torch.no_grad():
            other = network({**batch, name: batch[name].flip(0)})
            assert (other != network(batch)).tolist() == changed, name


def test_tokens_are_what_the_losses_are_sums_over():
    network, batch = model(), batch_of(*MONTHS)
    for head in (network.text_head, network.mel_head):
        torch.nn.init.zeros_(head.weight)
    with torch.no_grad():
        means = network(batch) / tokens(batch)
    assert tokens(batch).tolist() == [sum(len(m.encode()) + 1 for m in MONTHS), sum(2 * len(m.encode()) + 1 for m in MONTHS)]
    torch.testing.assert_close(means, torch.tensor([601.0, 66]).log())


def test_partly_frozen_tables_give_the_same_losses_and_gradients():
    plain, frozen, batch = model(), converted(model()), batch_of(*MONTHS)
    shapes = []
    frozen.text_head.register_forward_hook(lambda module, args, output: shapes.append(output.shape))
    plain_sums, frozen_sums = plain(batch), frozen(batch)
    assert shapes == [()]  # the loss itself, not logits
    torch.testing.assert_close(frozen_sums, plain_sums)
    plain_sums.sum().backward()
    frozen_sums.sum().backward()
    parameters = dict(frozen.named_parameters())
    for name, parameter in plain.named_parameters():
        if name in ("text_embedding.weight", "text_head.weight"):
            whole, parameter = parameter, parameters[name.replace("weight", "trainable")]
            torch.testing.assert_close(parameter.grad, whole.grad[BASE:], atol=1e-4, rtol=1e-4)
            assert parameters[name.replace("weight", "frozen")].grad is None
        elif name == "text_head.bias":
            torch.testing.assert_close(parameters["text_head.trainable_bias"].grad, parameter.grad[BASE:], atol=1e-4, rtol=1e-4)
        elif parameter.requires_grad:
            torch.testing.assert_close(parameters[name].grad, parameter.grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("change", [lambda network: network, converted])
def test_a_blank_batch_has_a_loss_of_zero_and_gradients_of_zero(change):
    network = change(model())
    sums = network(blank())
    assert tokens(blank()).tolist() == sums.tolist() == [0, 0]
    sums.sum().backward()
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert not parameter.grad.any(), name
        else:
            assert "frozen" in name or name.startswith("conditioning_encoder."), name


@pytest.mark.parametrize("change", [lambda network: network, converted])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lower_precisions(change, dtype):
    network, batch = change(model()), batch_of(*MONTHS)
    sums = network(batch)
    with torch.autocast("cpu", dtype=dtype):
        under_autocast = network(batch)
    cast = network.to(dtype)(batch)
    for found in (under_autocast, cast):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, sums, atol=0, rtol=2e-3)
    cast.sum().backward()


def test_training_learns_the_pairs_and_leaves_the_base_rows():
    network, batch = converted(model()), batch_of(*MONTHS)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    optimizer = torch.optim.AdamW((p for p in network.parameters() if p.requires_grad), lr=3e-3, weight_decay=0.1)
    losses = []
    for _ in range(30):
        losses.append(network(batch) / tokens(batch))
        (losses[-1] * torch.tensor([0.4, 0.6])).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (losses[-1] < 0.5 * losses[0]).all()
    after = network.state_dict()
    for name in ("text_embedding.weight", "text_head.weight", "text_head.bias"):
        assert torch.equal(after[name][:BASE], before[name][:BASE])
        assert not torch.equal(after[name][BASE:], before[name][BASE:])


def test_conditions_are_made_from_frames_of_any_number():
    encoder = ConditioningEncoder(TINY)
    assert encoder(torch.randn(2, 17, TINY.mel_bins)).shape == (2, TINY.conditions, TINY.width)


def base_state(seed: int = 2) -> dict[str, Tensor]:
    return model(replace(TINY, text_vocab=BASE), seed=seed).state_dict()


def test_a_base_of_fewer_pieces_fills_the_first_rows():
    network, state = model(), base_state()
    fresh = {name: value.clone() for name, value in network.state_dict().items()}
    assert load_base(network, state, BASE) == []
    for name, value in network.state_dict().items():
        if name.startswith("text_head.") or name == "text_embedding.weight":
            assert torch.equal(value[:BASE], state[name][:BASE])
            assert torch.equal(value[BASE:], fresh[name][BASE:])
        else:
            assert torch.equal(value, state[name])


def test_a_base_of_the_same_pieces_fills_all():
    network, state = model(), model(seed=2).state_dict()
    load_base(network, state, TINY.text_vocab)
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


def test_what_only_the_base_has_is_left_out():
    network, state = model(), base_state()
    extra = ["inference_model.lm_head.0.weight", "gpt.wte.weight", "gpt.h.0.attn.c_attn.lora_A.default.weight", "emovec_layer.weight"]
    encoder = [name for name in state if name.startswith("conditioning_encoder.")]
    names = {name: name.replace("c_attn.", "c_attn.base_layer.") for name in state}
    given = {names[name]: value for name, value in state.items()} | {name: torch.zeros(2, 2) for name in extra}
    del given[encoder[0]]
    assert sorted(load_base(network, given, BASE)) == sorted([*extra, *encoder[1:]])
    assert torch.equal(network.gpt.h[1].attn.c_attn.weight, state["gpt.h.1.attn.c_attn.weight"])


def test_a_base_that_does_not_fit_is_refused_and_nothing_changes():
    network, state = model(), base_state()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    lacking = {name: value for name, value in state.items() if name != "final_norm.bias"} | {"mel_head.bias": torch.zeros(8)}
    deeper = state | {"gpt.h.2.ln_1.weight": torch.zeros(64)}
    for given, vocab, said in (
        (lacking, BASE, r"mel_head\.bias is \[8\], expected \[66\]"),
        (lacking, BASE, r"final_norm\.bias is missing, expected \[64\]"),
        (state, BASE - 1, r"text_head\.weight is \[301, 64\], expected \[300, 64\]"),
        (deeper, BASE, r"gpt\.h\.2\.ln_1\.weight is \[64\], expected 2 layers"),
        ({"a": torch.zeros(1)}, BASE, r"and \d+ more"),
        (state, TINY.text_vocab + 1, "601 pieces, the tokenizer's 600"),
    ):
        with pytest.raises(UsageError, match=said):
            load_base(network, given, vocab)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_weights_are_read_from_files(tmp_path):
    state = base_state()
    torch.save(state, tmp_path / "bare.pt")
    torch.save({"model": state, "step": 3}, tmp_path / "under.pth")
    save_file(state, tmp_path / "weights.safetensors")
    for path in tmp_path.iterdir():
        found = read_state(path)
        assert found.keys() == state.keys()
        assert all(torch.equal(found[name], state[name]) for name in state)


class Intruder:
    def __reduce__(self) -> tuple:
        return pytest.fail, ("it was executed",)


def test_files_without_weights_are_refused_in_one_line(tmp_path):
    torch.save(base_state(), tmp_path / "cut.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "cut.pth").read_bytes()[:1000])
    (tmp_path / "text.pth").write_text("hello world")
    (tmp_path / "text.safetensors").write_text("hello world")
    torch.save({"model": base_state(), "config": Intruder()}, tmp_path / "objects.pth")
    torch.save({"step": 3}, tmp_path / "numbers.pth")
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    (tmp_path / "folder.pth").mkdir()
    for path in [*tmp_path.iterdir(), tmp_path / "absent.pth", tmp_path / "absent.safetensors"]:
        with pytest.raises(UsageError, match=path.name) as refused:
            read_state(path)
        assert "\n" not in str(refused.value)
