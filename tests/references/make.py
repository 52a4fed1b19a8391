"""Makes the small random models beside this file, and what transformers computes with them: run once.

python -m venv build/reference
build/reference/bin/pip install torch transformers
build/reference/bin/python tests/references/make.py
"""

import pathlib
import sys
import tempfile
import zipfile

import numpy as np
import torch
import transformers

HERE = pathlib.Path(__file__).parent
VOCABULARY, LENGTH = 40, 9


def randomised(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Every parameter, norms and biases too, away from where it begins."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model.eval()


def llama(tied: bool) -> None:
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        rope_theta=500.0,
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
    )
    model = randomised(transformers.LlamaForCausalLM(config), seed=1 + tied)
    tokens = np.random.default_rng(0).integers(1, VOCABULARY, (2, LENGTH))
    with torch.no_grad():
        logits = model(torch.tensor(tokens)).logits.numpy()
        follows = model.generate(torch.tensor(tokens), max_new_tokens=5, do_sample=False, eos_token_id=None)
    where = HERE / ("llama_tied" if tied else "llama")
    model.save_pretrained(where)
    np.savez(where / "expected.npz", tokens=tokens, logits=logits, follows=follows[:, LENGTH:].numpy())


def bert() -> None:
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,
    )
    model = randomised(transformers.BertModel(config), seed=3)
    tokens = np.random.default_rng(1).integers(1, VOCABULARY, (3, LENGTH))
    tokens[1, 6:] = tokens[2, 2:] = 0
    with torch.no_grad():
        hidden = model(torch.tensor(tokens), attention_mask=torch.tensor(tokens != 0)).last_hidden_state.numpy()
    model.save_pretrained(HERE / "bert")
    np.savez(HERE / "bert" / "expected.npz", tokens=tokens, hidden=hidden)


TEXTS = (
    "To be, or not to be: that is the question.",
    "Ünïcödé 2026 — a text with 12 digits, 3 commas,\n  and two lines.",
)


def real(smollm2: str, minilm: str) -> None:
    """A few numbers by the published weights of SmolLM2-135M-Instruct and all-MiniLM-L6-v2."""
    where = pathlib.Path(smollm2)
    tokenizer = transformers.AutoTokenizer.from_pretrained(where.parent, gguf_file=where.name)
    model = transformers.AutoModelForCausalLM.from_pretrained(where.parent, gguf_file=where.name).eval()
    found = {}
    for i, text in enumerate(TEXTS):
        tokens = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            found[f"smollm2/tokens/{i}"] = tokens.numpy()
            found[f"smollm2/logits/{i}"] = model(tokens).logits[0, -1, ::97].numpy()
            follows = model.generate(tokens, max_new_tokens=8, do_sample=False, eos_token_id=None)
            found[f"smollm2/follows/{i}"] = follows[:, tokens.shape[1] :].numpy()
    with tempfile.TemporaryDirectory() as directory:
        zipfile.ZipFile(minilm).extractall(directory)
        where = next(pathlib.Path(directory).rglob("config.json")).parent
        tokenizer = transformers.AutoTokenizer.from_pretrained(where)
        model = transformers.AutoModel.from_pretrained(where).eval()
        batch = tokenizer(list(TEXTS), padding=True, return_tensors="pt")
        with torch.no_grad():
            hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    mean = (hidden * mask).sum(1) / mask.sum(1)
    found["minilm/tokens"] = batch["input_ids"].numpy()
    found["minilm/embeddings"] = torch.nn.functional.normalize(mean).numpy()
    np.savez(HERE / "real.npz", texts=np.array(TEXTS), **found)


if __name__ == "__main__":
    if sys.argv[1:]:
        real(*sys.argv[1:])
    llama(tied=False)
    llama(tied=True)
    bert()
