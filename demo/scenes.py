"""The scenes of the demo: what a client asks, what must come back, and how it looks.

Owns the requests, the checks and their looks on a terminal of 80 columns. Knows nothing of
processes; it is given two URLs and the answers that the models were trained to give.
"""

import json
import os
import re
import sys
import textwrap
from collections.abc import Mapping
from http.client import HTTPException

from calls import Answer, Call

BASE = "tiny"
ALIAS = "gpt-3.5-turbo"
MISSPELT = "sqll"
WIDTH = 80

BOLD, RED, GREEN, CYAN = "1", "31", "32", "36"


def paint(style: str, text: str) -> str:
    """The text in a colour or weight, where there is a terminal that shows it."""
    if not sys.stdout.isatty() or "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb":
        return text
    return f"\x1b[{style}m{text}\x1b[0m"


def served_adapters(vllm: str) -> list[str]:
    """The names of the LoRA modules that a vLLM lists itself."""
    return [card["id"] for card in Call(f"{vllm}/v1/models").send().json["data"] if card["parent"]]


def forget(vllm: str, served: str) -> Call:
    """The call that takes an adapter from a vLLM, behind the proxy's back."""
    return Call(f"{vllm}/v1/unload_lora_adapter", {"lora_name": served})


class Scenes:
    """Plays every scene in order; `passed` and `failed` count the checks.

    Args:
        proxy: The proxy's URL; freshly started, so that its counters tell this story only.
        vllm: The URL of the server behind it, with no adapter loaded.
        answers: `prompt`, and what `base`, `sql` and `pirate` answer to it.
    """

    def __init__(self, proxy: str, vllm: str, answers: Mapping[str, str]) -> None:
        self.passed = 0
        self.failed = 0
        self._proxy = proxy
        self._vllm = vllm
        self._answers = answers
        self._scene = 0

    def play(self) -> None:
        """All of it. A request that breaks off fails its scene, and the next one begins."""
        for scene in (
            self._list_models,
            self._ask_base,
            self._ask_adapter,
            self._ask_second_adapter,
            self._ask_alias,
            self._ask_streaming,
            self._ask_forgotten,
            self._ask_unknown,
            self._read_metrics,
        ):
            try:
                scene()
            except (OSError, HTTPException, ValueError, LookupError, TypeError) as error:
                self._check(False, f"the answer can be read: {type(error).__name__}: {error}")

    def chat(self, model: str, **more: object) -> Call:
        """The one question that all are asked."""
        messages = [{"role": "user", "content": self._answers["prompt"]}]
        body = {"model": model, "messages": messages, "temperature": 0, **more}
        return Call(f"{self._proxy}/v1/chat/completions", body)

    # --- scenes --------------------------------------------------------------------------

    def _list_models(self) -> None:
        self._title("The models that a client can name")
        answer = self._send(Call(f"{self._proxy}/v1/models"), "data id parent")
        parents = {card["id"]: card["parent"] for card in answer.json["data"]}
        expected = {BASE: None, "sql": BASE, "pirate": BASE, ALIAS: BASE}
        self._check(parents == expected, "base model, both adapters and the alias, parents set")
        self._check("/adapters/" not in answer.text, "no file path is given away")

    def _ask_base(self) -> None:
        self._title(f"The base model, by its name: {BASE}")
        self._ask(BASE, "base")

    def _ask_adapter(self) -> None:
        self._title("An adapter, by its name: sql")
        before = self._show_served("before")
        answer = self._ask("sql", "sql")
        after = self._show_served("after")
        self._check(not before and len(after) == 1, "the first request had vLLM load it")
        again = self.chat("sql").send()
        print(f"It took {answer.seconds:.2f} s, the load included; again: {again.seconds:.2f} s.")

    def _ask_second_adapter(self) -> None:
        self._title("Another adapter, before the same vLLM: pirate")
        self._ask("pirate", "pirate")

    def _ask_alias(self) -> None:
        self._title(f"A name that a client has built in, as an alias of sql: {ALIAS}")
        self._ask(ALIAS, "sql")
        self._check(len(served_adapters(self._vllm)) == 2, "nothing was loaded twice")

    def _ask_streaming(self) -> None:
        self._title("An adapter, streamed")
        call = self.chat("pirate", stream=True)
        self._show(call)
        *events, last = self._show_events(call)
        chunks = [json.loads(event) for event in events]
        deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
        text = "".join(delta.get("content") or "" for delta in deltas)
        self._check(text == self._answers["pirate"], f"the chunks make: {text}")
        self._check({chunk["model"] for chunk in chunks} == {"pirate"}, "each of them says pirate")
        self._check(last == "[DONE]", "the stream is complete")

    def _ask_forgotten(self) -> None:
        self._title("vLLM forgets its adapters, as it does when it restarts")
        for served in served_adapters(self._vllm):
            self._show(forget(self._vllm, served))
            print(forget(self._vllm, served).send().text)
        self._check(not served_adapters(self._vllm), "vLLM has no adapter any more")
        self._ask("sql", "sql")

    def _ask_unknown(self) -> None:
        self._title(f"A name that nobody has: {MISSPELT}")
        answer = self._send(self.chat(MISSPELT), "error message type param code")
        self._check(answer.status == 404, f"status {answer.status}")
        error = answer.json["error"]
        self._check(error["code"] == "model_not_found", f"code {error['code']}")
        self._check(re.search(r"\bsql\b", error["message"]), "it names the closest name")

    def _read_metrics(self) -> None:
        self._title("What the proxy counted")
        call = Call(f"{self._proxy}/metrics")
        pattern = "lora_proxy_(requests|adapter_loads)_total{"
        print(paint(CYAN, f"$ {call.curl} |\n    grep -E '^{pattern}'"))
        lines = [line for line in call.send().text.splitlines() if re.match(pattern, line)]
        for line in lines:
            print(textwrap.fill(line.replace(",", ", "), WIDTH, subsequent_indent="    "))
        for name, adapter, expected in (
            ("requests", BASE, 1),
            ("requests", "sql", 4),
            ("requests", "pirate", 2),
            ("adapter_loads", "sql", 2),
            ("adapter_loads", "pirate", 1),
        ):
            count = _total(lines, f"lora_proxy_{name}_total", adapter)
            self._check(count == expected, f"{name.replace('_', ' ')} of {adapter}: {count:.0f}")

    # --- what scenes are made of ---------------------------------------------------------

    def _ask(self, model: str, answers_as: str) -> Answer:
        """Asks as `model`, and checks that the answer is the one that `answers_as` gives."""
        answer = self._send(self.chat(model), "model choices message content")
        content = answer.json["choices"][0]["message"]["content"]
        self._check(content == self._answers[answers_as], f"{answers_as} answered")
        self._check(answer.json["model"] == model, f"the answer says {answer.json['model']}")
        return answer

    def _send(self, call: Call, keys: str) -> Answer:
        self._show(call)
        answer = call.send()
        text = shortened(answer.json, keys)
        print(textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False))
        return answer

    def _show_events(self, call: Call) -> list[str]:
        events = []
        for event in call.stream():
            events.append(event)
            whole = event == "[DONE]"
            text = event if whole else shortened(json.loads(event), "model choices delta content")
            print(f"data: {text}", flush=True)
        return events

    def _show_served(self, when: str) -> list[str]:
        served = served_adapters(self._vllm)
        print(f"Adapters that vLLM itself lists {when}: {', '.join(served) or 'none'}")
        return served

    def _title(self, text: str) -> None:
        self._scene += 1
        print(f"\n{paint(BOLD, f'{self._scene}. {text}')}")

    def _show(self, call: Call) -> None:
        print(paint(CYAN, f"$ {call.curl}"))

    def _check(self, passed: object, text: str) -> None:
        if passed:
            self.passed += 1
            print(f"{paint(GREEN, '✔')} {text}")
        else:
            self.failed += 1
            print(f"{paint(RED, '✘')} {text}")


def shortened(value: object, keys: str) -> str:
    """Some keys of a JSON value on one line; `…` stands for the others."""
    picked = _pick(value, frozenset(keys.split()))
    return json.dumps(picked, ensure_ascii=False).replace('"…": null', "…")


def _pick(value: object, keys: frozenset[str]) -> object:
    if isinstance(value, list):
        return [_pick(item, keys) for item in value]
    if not isinstance(value, dict):
        return value
    picked = {key: _pick(item, keys) for key, item in value.items() if key in keys}
    return picked if len(picked) == len(value) else picked | {"…": None}


def _total(lines: list[str], name: str, adapter: str) -> float:
    """The sum of a counter's series of one adapter."""
    start, label = f"{name}{{", f'adapter="{adapter}"'
    return sum(
        float(line.rpartition(" ")[2]) for line in lines if line.startswith(start) and label in line
    )
