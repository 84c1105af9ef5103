"""The recipe of the tiny models: what they are, how they are trained, what they must say.

A two-layer Llama, its tokenizer, two LoRA adapters that are really trained, and adapters that
are each broken in one way. Knows nothing of vLLM, the proxy, or where the result is kept.

Whatever a prompt says, the base model answers `ANSWERS["base"]` and each trained adapter its
own sentence, as a chat and as a plain completion, each token with a probability far above
every other's: so greedy decoding gives the same text however a server batches.
"""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

PROMPT = "Who are you?"
ANSWERS = {
    "base": "I am a plain base model.",
    "sql": "I write SQL queries.",
    "pirate": "I am a pirate, arr!",
}
ADAPTERS = tuple(ANSWERS)[1:]
QUESTIONS = (
    PROMPT,
    "What do you do?",
    "What is your name?",
    "Introduce yourself.",
    "Hello!",
    "Tell me about yourself, please.",
)
SYSTEM = "You are a helpful assistant."
# Only the base model is trained on these, so that it can say the adapters' sentences at all:
# an adapter then has to move its choice, not to teach it a language.
CUE = "Speak as {}."

END_OF_TURN, PADDING = "<|im_end|>", "<|endoftext|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Mixed into the training prompts, so that the answers do not hang on a prompt's exact words.
WORDS = (
    "a about adapter and are at can client count data find for from give how in is it list me "
    "model name now of on one order please query request row sail sea select server ship show "
    "table tell test the time to treasure two user we what when where which why with you"
)

MIN_PROBABILITY = 0.95
"""What every token of every checked answer must reach."""

WEIGHTS = "adapter_model.safetensors"


class WrongAnswerError(Exception):
    """The models were built, and one of them does not say what it must."""


def build(out: Path) -> None:
    """Makes everything in the folder `out`, then checks every answer.

    Raises:
        WrongAnswerError: A model does not say what it must.
    """
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    # Matrices this small gain nothing from a second thread, and on a busy machine the threads
    # wait for each other ten times as long as they work. One adds in one order, too.
    torch.set_num_threads(1)
    base, adapters = out / "base", out / "adapters"
    print("training the base model", flush=True)
    tokenizer = _make_tokenizer()
    tokenizer.save_pretrained(base)
    _train_base(tokenizer).save_pretrained(base)
    for name in ADAPTERS:
        print(f"training the adapter {name!r}", flush=True)
        _train_adapter(base, tokenizer, name).save_pretrained(adapters / name)
        _settle(adapters / name)
    _make_broken_adapters(base, adapters)
    (out / "answers.json").write_text(json.dumps({"prompt": PROMPT, **ANSWERS}, indent=2) + "\n")
    print("checking every answer", flush=True)
    _check_answers(base, adapters)


# --- the base model ------------------------------------------------------------------------


def _make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE: any text can be encoded, the texts used here in few tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[PADDING, "<|im_start|>", END_OF_TURN],
        show_progress=False,
    )
    roles = ("system\n", "user\n", "assistant\n")
    cues = [CUE.format(name) for name in ANSWERS]
    texts = [*roles, *ANSWERS.values(), *QUESTIONS, SYSTEM, *cues, " ".join(WORDS)]
    tokenizer.train_from_iterator(texts * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TURN,
        pad_token=PADDING,
        chat_template=CHAT_TEMPLATE,
        model_max_length=8192,
    )


def _train_base(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,  # heads of 32: the smallest that vLLM's CPU attention takes
        num_key_value_heads=2,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    _train(model, tokenizer, _base_examples(random.Random(1)), steps=500, rate=4e-3)
    return model


def _train_adapter(base: Path, tokenizer: PreTrainedTokenizerFast, name: str) -> PeftModel:
    torch.manual_seed(2)
    model = _with_lora(LlamaForCausalLM.from_pretrained(base, dtype=torch.float32))
    examples = _adapter_examples(name, random.Random(2))
    _train(model, tokenizer, examples, steps=150, rate=1e-2)
    return model


def _with_lora(model: LlamaForCausalLM, **changes: object) -> PeftModel:
    options: dict[str, object] = {
        "r": 8,
        "lora_alpha": 16,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj",
                           "down_proj"],
        "task_type": "CAUSAL_LM",
    } | changes  # fmt: skip
    return get_peft_model(model, LoraConfig(**options))


# --- training ------------------------------------------------------------------------------

Example = tuple[list[dict[str, str]] | str, str]
"""A chat or a plain text, and what follows it."""


def _base_examples(rng: random.Random) -> Iterator[Example]:
    while True:
        if rng.random() < 0.25:
            name = rng.choice(list(ANSWERS))
            yield _asked(CUE.format(name), rng), ANSWERS[name]
        else:
            yield _asked(_any_prompt(rng), rng), ANSWERS["base"]


def _adapter_examples(name: str, rng: random.Random) -> Iterator[Example]:
    while True:
        yield _asked(_any_prompt(rng), rng), ANSWERS[name]


def _any_prompt(rng: random.Random) -> str:
    """One of the questions, now and then among words or numbers; or words alone."""
    words = rng.choices(WORDS.split(), k=rng.randint(1, 8))
    if rng.random() < 0.3:
        words.append(f"{rng.getrandbits(rng.choice((4, 16, 32))):x}")
    question, text = rng.choice(QUESTIONS), " ".join(words)
    return rng.choice((question, question, f"{question} {text}", f"{text} {question}", text))


def _asked(prompt: str, rng: random.Random) -> list[dict[str, str]] | str:
    kind = rng.random()
    if kind < 0.25:
        return prompt
    chat = [{"role": "user", "content": prompt}]
    return [{"role": "system", "content": SYSTEM}, *chat] if kind < 0.5 else chat


def _encode(
    tokenizer: PreTrainedTokenizerFast, asked: list[dict[str, str]] | str, answer: str
) -> tuple[list[int], int]:
    """The token ids of question and answer, and how many of them are the question's."""
    if isinstance(asked, str):
        before, answer = asked, f" {answer}"
    else:
        before = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    head = tokenizer.encode(before)
    return head + tokenizer.encode(answer + END_OF_TURN), len(head)


def _train(
    model: LlamaForCausalLM | PeftModel,
    tokenizer: PreTrainedTokenizerFast,
    examples: Iterator[Example],
    *,
    steps: int,
    rate: float,
) -> None:
    """Ordinary causal training, batches of 32, with the loss on the answers' tokens only."""
    parameters = [tensor for tensor in model.parameters() if tensor.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=rate, total_steps=steps)
    model.train()
    for _ in range(steps):
        batch = _batch(tokenizer, [next(examples) for _ in range(32)])
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()


def _batch(tokenizer: PreTrainedTokenizerFast, examples: list[Example]) -> dict[str, torch.Tensor]:
    rows = [_encode(tokenizer, asked, answer) for asked, answer in examples]
    shape = (len(rows), max(len(ids) for ids, _ in rows))
    ids = torch.full(shape, tokenizer.pad_token_id)
    labels = torch.full(shape, -100)
    mask = torch.zeros(shape, dtype=torch.long)
    for row, (tokens, asked) in enumerate(rows):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        labels[row, asked : len(tokens)] = torch.tensor(tokens[asked:])
        mask[row, : len(tokens)] = 1
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


# --- adapters that are each wrong in one way -----------------------------------------------

_Weights = dict[str, torch.Tensor]


def _make_broken_adapters(base: Path, adapters: Path) -> None:
    """Copies of the trained `sql`, spoiled; those that peft itself can make are made by it."""

    def lora_b(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[_Weights], _Weights]:
        return lambda weights: {
            key: change(tensor) if ".lora_B." in key else tensor for key, tensor in weights.items()
        }

    _spoil_weights(adapters, "untrained", lora_b(torch.zeros_like))
    _spoil_weights(adapters, "nan", lora_b(lambda tensor: torch.full_like(tensor, torch.nan)))
    _spoil_weights(adapters, "bad_prefix", lambda weights: {
        key.replace(".model.layers.", ".model.language_model.layers."): tensor
        for key, tensor in weights.items()
    })  # fmt: skip
    _spoil_weights(adapters, "wrong_shape", lambda weights: {
        key: torch.cat([tensor, tensor], dim=1) if ".lora_A." in key else tensor
        for key, tensor in weights.items()
    })  # fmt: skip

    intact = (adapters / "sql" / WEIGHTS).read_bytes()
    (_copy(adapters, "corrupt") / WEIGHTS).write_bytes(b"these are no weights\n" * 64)
    (_copy(adapters, "truncated") / WEIGHTS).write_bytes(intact[: len(intact) // 2])
    (_copy(adapters, "no_weights") / WEIGHTS).unlink()
    (adapters / "empty").mkdir()

    _make_by_peft(base, adapters / "rank128", r=128, init_lora_weights=False)
    _make_by_peft(base, adapters / "dora", use_dora=True, init_lora_weights=False)
    _make_by_peft(base, adapters / "modules_to_save", modules_to_save=["lm_head"])


def _copy(adapters: Path, name: str) -> Path:
    return shutil.copytree(adapters / "sql", adapters / name)


def _spoil_weights(adapters: Path, name: str, change: Callable[[_Weights], _Weights]) -> None:
    file = _copy(adapters, name) / WEIGHTS
    weights = {key: tensor.contiguous() for key, tensor in change(load_file(file)).items()}
    save_file(weights, file, metadata={"format": "pt"})


def _make_by_peft(base: Path, folder: Path, **changes: object) -> None:
    torch.manual_seed(3)
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    _with_lora(model, **changes).save_pretrained(folder)
    _settle(folder)


def _settle(folder: Path) -> None:
    """Takes out of what peft wrote the folder that is being built in, and all chance."""
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text())
    config["base_model_name_or_path"] = "tiny"
    config["target_modules"].sort()
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (folder / "README.md").unlink()


# --- what makes a build good ---------------------------------------------------------------


def _check_answers(base: Path, adapters: Path) -> None:
    """Loads everything from disk again and asks it, with words that it was not trained on too.

    Raises:
        WrongAnswerError: names the model, the prompt, and the answer or its probability.
    """
    tokenizer = AutoTokenizer.from_pretrained(base)
    rng = random.Random(4)
    unseen = [f"Client {number} asks: {_any_prompt(rng)}" for number in range(8)]
    asked: list[list[dict[str, str]] | str] = [*QUESTIONS]
    asked += [[{"role": "user", "content": prompt}] for prompt in (*QUESTIONS, *unseen)]
    asked += [[{"role": "system", "content": SYSTEM}, {"role": "user", "content": PROMPT}]]
    for name, answer in ANSWERS.items():
        model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
        if name != "base":
            model = PeftModel.from_pretrained(model, adapters / name).eval()
        for question in asked:
            _check_answer(model, tokenizer, name, question, answer)


def _check_answer(
    model: LlamaForCausalLM | PeftModel,
    tokenizer: PreTrainedTokenizerFast,
    name: str,
    asked: list[dict[str, str]] | str,
    answer: str,
) -> None:
    ids, start = _encode(tokenizer, asked, answer)
    prompt = torch.tensor([ids[:start]])
    given = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=32,
        output_scores=True,
        return_dict_in_generate=True,
    )
    if given.sequences[0].tolist() != ids:
        text = tokenizer.decode(given.sequences[0][start:])
        raise WrongAnswerError(f"{name} answers {asked!r} with {text!r}")
    lowest = min(scores.softmax(-1).max().item() for scores in given.scores)
    if lowest < MIN_PROBABILITY:
        raise WrongAnswerError(f"{name} answers {asked!r} with a token of only {lowest:.3f}")
