"""Requests to a smart home, each with its intent, sampled from the sentence templates of Home Assistant.

pip install --no-deps home-assistant-intents==2026.10.27
"""

from __future__ import annotations

import json
import random
import re
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from carriers import packaged_file

TEMPLATES = (
    "home-assistant-intents",
    "2026.10.27",
    "en.json",
    "0b9d606a216b1712409a3d822a8edfb9ff4458e51e421792882ea24e0ce1d456",
)
FREE = {
    "area": ["kitchen", "bedroom", "living room", "office", "garage", "hall"],
    "floor": ["first floor", "basement", "upstairs"],
    "message": ["dinner is ready", "time to go"],
    "name": ["lamp", "fan", "heater", "groceries", "front door", "robot"],
    "search_query": ["jazz", "the news", "queen"],
    "shopping_list_item": ["milk", "apples", "bread"],
    "timer_command": ["turn off the lights", "open the blinds"],
    "timer_name": ["pizza", "laundry"],
    "todo_list_item": ["call mom", "pay rent"],
    "zone": ["school", "work"],
}
"""Values of the slots that Home Assistant leaves open."""


class Grammar:
    """Samples sentences from templates: (one|of these), (in;any order), [optional], {slot}, <rule>."""

    def __init__(self, rules: dict[str, str], slots: dict[str, Any], seed: int) -> None:
        self.rules, self.slots, self.random = rules, slots, random.Random(seed)

    def sample(self, template: str) -> str:
        """Sample a sentence."""
        tokens = re.findall(r"[\[\]()|;]|\{[^}]*\}|<[^>]*>|[^\[\]()|;{}<>]+", template)
        return " ".join(self._read_group(tokens[::-1]).split())

    def _read_group(self, tokens: list[str]) -> str:
        parts, in_any_order = [""], False
        while tokens and (token := tokens.pop()) not in ("]", ")"):
            if token in ("|", ";"):
                parts.append("")
                in_any_order |= token == ";"
            elif token in ("(", "["):
                inner = self._read_group(tokens)
                parts[-1] += inner if token == "(" or self.random.random() < 0.5 else ""
            elif token[0] in "{<":
                name = token[1:-1].strip().partition(":")[0]
                parts[-1] += self.sample(self.rules[name]) if token[0] == "<" else self._fill(name)
            else:
                parts[-1] += token
        if in_any_order:
            self.random.shuffle(parts)
            return " ".join(parts)
        return self.random.choice(parts)

    def _fill(self, name: str) -> str:
        if name in FREE:
            return self.random.choice(FREE[name])
        slot = self.slots[name]
        if "range" in slot:
            return str(self.random.randint(slot["range"]["from"], slot["range"]["to"]))
        return self.sample(self.random.choice(slot["values"])["in"])


def load_intents(count: int = 150) -> list[tuple[str, str]]:
    """Up to `count` different requests of each intent that has at least 30, with its name: "set volume"."""
    data = json.loads(packaged_file(*TEMPLATES).read_text(encoding="utf-8"))
    grammar = Grammar(data["expansion_rules"], data["lists"], seed=0)
    rows = []
    for intent, entry in sorted(data["intents"].items()):
        templates = [sentence for part in entry["data"] for sentence in part["sentences"]]
        found = dict.fromkeys(grammar.sample(grammar.random.choice(templates)) for _ in range(3 * count))
        name = " ".join(re.findall("[A-Z][a-z]*", intent.removeprefix("Hass"))).lower()
        rows += [(text, name) for text in list(found)[:count]] if len(found) >= 30 else []
    return rows
