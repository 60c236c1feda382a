"""Write configs/instruct/tasks/general.jsonl: questions of general knowledge, four answers each.

    pip install --no-deps countryinfo==1.0.1      # MIT: countries, capitals and regions
    python scripts/general_questions.py

Countries whose capital is disputed, is two, or was moved since are left out. Wrong answers are
drawn from the right answers to other questions of the same kind, capitals from the same region.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from comigs.seeds import generator

OUT = Path(__file__).parent.parent / "configs" / "instruct" / "tasks" / "general.jsonl"
PEOPLE = 1_000_000  # of a country at least
LEFT_OUT = (
    "Benin, Bolivia, Burundi, Hong Kong, Israel, Ivory Coast, Kazakhstan, Malaysia, Palestine, "
    "Puerto Rico, Republic of Macedonia, Serbia and Montenegro, South Africa, Sri Lanka, "
    "Swaziland, Taiwan, Tanzania, Singapore, Indonesia, Equatorial Guinea"
)
AMBIGUOUS = "Russia, Turkey, Egypt, Georgia, Azerbaijan, Armenia, East Timor"  # of two continents
CONTINENTS = ("Africa", "Asia", "Europe", "the Americas")
ELEMENTS = (
    "H hydrogen, He helium, Li lithium, Be beryllium, B boron, C carbon, N nitrogen, O oxygen, "
    "F fluorine, Ne neon, Na sodium, Mg magnesium, Al aluminium, Si silicon, P phosphorus, "
    "S sulfur, Cl chlorine, Ar argon, K potassium, Ca calcium, Sc scandium, Ti titanium, "
    "V vanadium, Cr chromium, Mn manganese, Fe iron, Co cobalt, Ni nickel, Cu copper, Zn zinc, "
    "Ga gallium, Ge germanium, As arsenic, Se selenium, Br bromine, Kr krypton, Rb rubidium, "
    "Sr strontium, Y yttrium, Zr zirconium, Nb niobium, Mo molybdenum, Ru ruthenium, Rh rhodium, "
    "Pd palladium, Ag silver, Cd cadmium, In indium, Sn tin, Sb antimony, Te tellurium, I iodine, "
    "Xe xenon, Cs caesium, Ba barium, La lanthanum, Ce cerium, Ta tantalum, W tungsten, "
    "Re rhenium, Os osmium, Ir iridium, Pt platinum, Au gold, Hg mercury, Tl thallium, Pb lead, "
    "Bi bismuth, Po polonium, Rn radon, Fr francium, Ra radium, Ac actinium, Th thorium, "
    "U uranium, Np neptunium, Pu plutonium"
)


def countries() -> list[dict[str, Any]]:
    """The larger countries with one capital, in the order of their names."""
    spec = importlib.util.find_spec("countryinfo")
    assert spec is not None and spec.origin is not None, "pip install --no-deps countryinfo==1.0.1"
    files = sorted((Path(spec.origin).parent / "data").glob("*.json"))
    found = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    large = [one for one in found if (one.get("population") or 0) > PEOPLE and one.get("capital")]
    kept = [one for one in large if one["name"] not in LEFT_OUT.split(", ")]
    return sorted(kept, key=lambda one: one["name"])


def item(kind: str, question: str, right: str, others: list[str]) -> dict[str, Any]:
    """A question with its right answer among three of the others, at a place that is drawn."""
    random = generator(0, "general", kind, question)
    different = sorted({*others} - {right})
    chosen = [different[n] for n in random.choice(len(different), 3, replace=False)]
    place = int(random.integers(4))
    choices = [*chosen[:place], right, *chosen[place:]]
    return {"kind": kind, "question": question, "choices": choices, "label": place}


def items() -> list[dict[str, Any]]:
    """All questions, kind by kind."""
    found = []
    known = countries()
    for one in known:
        region = [other["capital"] for other in known if other["region"] == one["region"]]
        near = region if len(region) > 3 else [other["capital"] for other in known]
        asked = f"What is the capital of {one['name']}?"
        found.append(item("capital", asked, one["capital"], near))
    for one in known:
        continent = one["region"].replace("Americas", "the Americas")
        if continent in CONTINENTS and one["name"] not in AMBIGUOUS.split(", "):
            asked = f"On which continent is {one['name']}?"
            found.append(item("continent", asked, continent, list(CONTINENTS)))
    pairs = [pair.split() for pair in ELEMENTS.split(", ")]
    for symbol, name in pairs:
        asked = f"Which chemical element has the symbol {symbol}?"
        found.append(item("element", asked, name, [other for _, other in pairs]))
    return found


if __name__ == "__main__":
    lines = [json.dumps(one, ensure_ascii=False) for one in items()]
    OUT.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{OUT}: {len(lines)} questions")
