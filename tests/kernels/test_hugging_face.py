"""Models of Hugging Face's transformers, whose trainer and files know nothing of the conversion."""

import pytest
import torch
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from engine_kernels import PartiallyFrozenEmbedding, PartiallyFrozenLinear, convert

ROWS, BASE, WIDTH = 41, 29, 16


def llama(tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 32}
    return LlamaForCausalLM(LlamaConfig(vocab_size=ROWS, tie_word_embeddings=tied, **sizes))


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=ROWS, n_embd=WIDTH, n_layer=1, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0))


class Texts(Dataset):
    def __len__(self) -> int:
        return 24

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(0, ROWS, (9,), generator=torch.Generator().manual_seed(number))
        return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: llama(False), {"embed_tokens": BASE, "lm_head": BASE}),
        (lambda: llama(True), {"embed_tokens": BASE}),
        (gpt2, {"transformer.wte": BASE}),
    ],
    ids=["llama", "llama tied", "gpt2"],
)
def test_a_model_is_converted_trained_saved_and_loaded_as_any_other(make, names, tmp_path):
    model, whole = make(), make()
    first = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    convert(model, names)
    assert isinstance(model.get_input_embeddings(), PartiallyFrozenEmbedding)
    assert isinstance(model.get_output_embeddings(), PartiallyFrozenLinear)
    assert model.state_dict().keys() == first.keys()
    ids = torch.randint(0, ROWS, (2, 9))
    torch.testing.assert_close(model.eval()(ids, labels=ids).loss, whole.eval()(ids, labels=ids).loss)

    arguments = TrainingArguments(
        str(tmp_path / "run"), num_train_epochs=2, per_device_train_batch_size=4, learning_rate=1e-2, weight_decay=0.1, gradient_accumulation_steps=2,
        report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=Texts()).train()
    model.save_pretrained(tmp_path / "saved")
    loaded = type(whole).from_pretrained(tmp_path / "saved")
    trained = loaded.state_dict()
    for name in first:
        if trained[name].shape[0] == ROWS:
            assert torch.equal(trained[name][:BASE], first[name][:BASE]), name
            assert not torch.equal(trained[name][BASE:], first[name][BASE:]), name
    torch.testing.assert_close(loaded(ids).logits, model.eval()(ids).logits)
    generated = model.generate(ids[:, :3], max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert torch.equal(generated, loaded.generate(ids[:, :3], max_new_tokens=3, do_sample=False, pad_token_id=0))


def test_the_fused_loss_is_that_of_the_models_own(tmp_path):
    model = convert(llama(False), {"embed_tokens": BASE, "lm_head": BASE})
    ids = torch.randint(0, ROWS, (2, 9))
    hidden = model.model(ids).last_hidden_state
    torch.testing.assert_close(model.lm_head(hidden[:, :-1], ids[:, 1:]), model(ids, labels=ids).loss)
