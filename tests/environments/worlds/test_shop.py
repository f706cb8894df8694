"""The shop against purchases priced by hand, the whole set of its tasks, and what a model may write."""

import collections
import hashlib
import importlib.util
import json
import sys

import pytest

from jaxrl_llm.environments.worlds import Shop
from jaxrl_llm.environments.worlds import check_text_world
from jaxrl_llm.environments.worlds import split_panels
from jaxrl_llm.environments.worlds.shop import Goal
from jaxrl_llm.environments.worlds.shop import catalogue
from jaxrl_llm.environments.worlds.shop import purchase_reward
from jaxrl_llm.environments.worlds.shop import world as pages
from jaxrl_llm.environments.worlds.shop.goals import all_goals

CAMERA = ("resolution", "4K")


def listing(product: str, attribute: tuple[str, str]):
    return next(one for one in catalogue.read_catalogue() if (one.product, one.attribute) == (product, attribute))


def variant(one, *options: str):
    return next(variant for variant in one.variants if variant.options == options)


def test_the_catalogue_is_that_of_the_source() -> None:
    about = json.loads(catalogue.FILE.read_text())
    assert about["source"] == catalogue.SOURCE
    assert "Permission is hereby granted, free of charge" in " ".join(about["license"])
    assert len(about["products"]) == 50
    assert sum(len(product["variants"]) for product in about["products"]) == 591
    listings = catalogue.read_catalogue()
    assert sum(len(one.variants) for one in listings) == 591
    titles = [one.title for one in listings]
    assert len({*titles}) == len(titles) == 138
    camera = listing("Action Camera", CAMERA)
    assert camera.kinds == ("color", "waterproof")
    assert variant(camera, "black", "no") == (("black", "no"), 522.86, False)
    assert variant(camera, "silver", "yes") == (("silver", "yes"), 481.5, True)


def test_the_catalogue_is_made_again_from_its_source_only(tmp_path, monkeypatch) -> None:
    about = json.loads(catalogue.FILE.read_text())
    products = {}
    for product in about["products"]:
        variants = {}
        for number, (*options, price, available) in enumerate(reversed(product["variants"])):
            named = dict(zip(product["kinds"], options, strict=True))
            variants[str(number)] = {"options": named, "price": price, "available": bool(available)}
        products[product["name"] + "-id"] = {"name": product["name"], "variants": variants}
    source = tmp_path / "db.json"
    source.write_text(json.dumps({"products": products}))
    with pytest.raises(ValueError, match=r"db\.json has the SHA-256 .*expected 413a6516"):
        catalogue.reduce(source, "")
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    expected = catalogue.FILE.read_text().replace(catalogue.SOURCE["sha256"], digest)
    monkeypatch.setitem(catalogue.SOURCE, "sha256", digest)
    assert catalogue.reduce(source, "\n".join(about["license"])) == expected


@pytest.mark.parametrize(
    ("product", "attribute", "options", "expected"),
    [
        # Asked: 4K, silver, waterproof, at most $482: four parts.
        ("Action Camera", CAMERA, ("silver", "yes"), 4 / 4),
        ("Action Camera", CAMERA, ("silver", "no"), 2 / 4),  # $521.07
        ("Action Camera", CAMERA, ("black", "yes"), 3 / 4),  # $466.75
        ("Action Camera", ("resolution", "5K"), ("silver", "yes"), 2 / 4),  # $497.39
        ("Action Camera", ("resolution", "5K"), ("black", "no"), 0 / 4),  # $523.66
        ("Backpack", ("compartment", "camera"), None, 0),  # another product, however cheap
    ],
)
def test_rewards_are_those_counted_by_hand(product, attribute, options, expected) -> None:
    goal = Goal("Action Camera", CAMERA, (("color", "silver"), ("waterproof", "yes")), 482)
    one = listing(product, attribute)
    bought = one.variants[0] if options is None else variant(one, *options)
    assert purchase_reward(goal, one, bought) == expected


def test_a_price_at_the_limit_is_within_it() -> None:
    goal, one = Goal("Action Camera", CAMERA, (), 482), listing("Action Camera", CAMERA)
    prices = [482.0, 482.01, 481.99]
    assert [purchase_reward(goal, one, one.variants[0]._replace(price=price)) for price in prices] == [1, 0.5, 1]


def test_every_task_is_solved_by_a_way_of_the_length_that_is_said() -> None:
    world, lengths = Shop(), collections.Counter()
    for seed, goal in enumerate(all_goals()):
        if seed % 4:
            continue
        episode, earned = world.reset(seed), 0.0
        for turn in range(1, world.turns + 1):
            reply = episode.step(str(episode.expert()))
            earned += reply.reward
            if reply.done:
                lengths[turn] += 1
                break
        assert earned == 1, goal
    assert sum(lengths.values()) == len(range(0, world.tasks, 4))
    assert {*lengths} == {3, 4, 5}, "buying a thing that is the only one left takes three, others a choice or two more"


def test_no_shorter_way_exists_where_every_page_is_tried() -> None:
    """Breadth-first over everything that can be clicked, other listings included, from the page of the search."""
    for seed in range(6):
        goal = all_goals()[seed]
        way = pages.shortest_way(goal, pages.Place())
        reached = {pages.follow(pages.Place(), f"search[{goal.product}]")}
        for turn in range(2, len(way) + 1):
            following = {to for place in reached for to in pages.buttons(place).values()}
            paid = {to for to in following if to.bought and worth(goal, to) == 1}
            assert bool(paid) == (turn == len(way)), (goal, turn)
            reached = following - paid


def worth(goal: Goal, bought: pages.Place) -> float:
    assert bought.listing is not None
    one = catalogue.read_catalogue()[bought.listing]
    return purchase_reward(goal, one, one.fitting(bought.choices)[0])


def test_the_search_for_a_product_shows_all_its_listings_on_the_first_page() -> None:
    for product in {one.product for one in catalogue.read_catalogue()}:
        place = pages.follow(pages.Place(), f"search[{product}]")
        assert isinstance(place, pages.Place)
        shown = [catalogue.read_catalogue()[index] for index in pages.search(place.query)[: pages.PAGE]]
        listed = [one for one in catalogue.read_catalogue() if one.product == product]
        assert {*listed} <= {*shown}


def test_a_way_written_out() -> None:
    seed = next(
        seed for seed, goal in enumerate(all_goals()) if goal[:2] == ("Action Camera", CAMERA) and goal[3] == 482
    )
    episode = Shop().reset(seed)
    assert episode.prompt.startswith("Buy Action Camera with resolution: 4K")
    assert "search[action camera]" in episode.admissible
    assert episode.step("click[buy]").text == "There is no such button here, or it is sold out."
    results = episode.step(" SEARCH[ 4K  action-camera ] ")
    assert results.text.splitlines()[:2] == [
        "Results for 4k action camera, page 1 of 2:",
        "Action Camera (resolution: 4K), $466.75 to $521.07",
    ]
    assert episode.step("search[laptop]").text == "There is no search field here; go back to search first."
    assert "page 2 of 2" in episode.step("click[next page]").text
    episode.step("click[previous page]")
    opened = episode.step("click[action camera (resolution: 4k)]")
    assert opened.text.splitlines() == [
        "Action Camera (resolution: 4K), $466.75 to $521.07",
        "color: black, silver",
        "waterproof: no, yes",
        "[previous page] [back to search]",
    ]
    assert not episode.step("click[buy]").valid, "two are still left"
    black = episode.step("click[color: black]")
    assert black.text.splitlines() == [
        "Action Camera (resolution: 4K), $466.75",
        "color: black (chosen), silver",
        "waterproof: no (sold out), yes",
        "[buy] [previous page] [back to search]",
    ]
    assert not episode.step("click[waterproof: no]").valid
    episode.step("click[color: black]")  # taken back
    assert "click[buy]" not in episode.step("click[color: silver]").admissible
    assert "$481.50" in episode.step("click[waterproof: yes]").text
    end = episode.step("click[buy]")
    assert (end.done, end.valid, end.admissible, end.reward) == (True, True, (), 1.0)
    assert episode.expert() is None


def test_the_expert_finds_the_way_back_from_anywhere() -> None:
    episode = Shop().reset(0)
    for wrong in ("search[perfume]", "click[next page]", "click[previous page]"):
        episode.step(wrong)
    episode.step(episode.step("click[back to search]").admissible[7])
    turns, reply = 0, None
    while reply is None or not reply.done:
        reply = episode.step(str(episode.expert()))
        turns += 1
    assert reply.reward == 1
    assert turns == 1 + len(pages.shortest_way(all_goals()[0], pages.Place()))


def test_the_shop_keeps_its_promises() -> None:
    check_text_world(Shop(), seeds=range(6))


@pytest.mark.parametrize(
    ("action", "sentence"),
    [
        ("", "An action is search[words] or click[name]."),
        ("search", "An action is search[words] or click[name]."),
        ("search[]", "There are no words to search for."),
        ("search[\0\x1b \u2603 \ud800]", "There are no words to search for."),
        (f"search[{'laptop ' * 10_000}]", "The search field takes 200 characters."),
        ("click[" * 10_000, "An action is search[words] or click[name]."),
        ("click[next page]", "There is no such button here, or it is sold out."),
    ],
)
def test_what_cannot_be_done_is_said(action, sentence) -> None:
    reply = Shop().reset(0).step(action)
    assert reply[:4] == (sentence, 0.0, False, False)


def test_a_search_that_finds_nothing_is_an_answer() -> None:
    reply = Shop().reset(0).step("search[zeppelin]")
    assert reply == ("Nothing was found for zeppelin.\n[back to search]", 0.0, False, True, ("click[back to search]",))


def test_products_that_are_measured_on_are_never_trained_on() -> None:
    world = Shop()
    train, measure = split_panels(world)
    products = [{all_goals()[seed].product for seed in panel.seeds} for panel in (train, measure)]
    assert not products[0] & products[1]
    assert (len(products[0]), len(products[1])) == (34, 16)
    # Whoever changes these changes what earlier runs were measured on.
    assert (world.name, world.tasks, len(measure.seeds)) == ("shop-5f4d7725-15", 1791, 737)
    assert measure.sha256.startswith("e671de1e")


def test_bad_settings_and_missing_packages_are_named(monkeypatch) -> None:
    with pytest.raises(ValueError, match="turns is 6; a task of the shop can take 7"):
        Shop(turns=6)
    with pytest.raises(ValueError, match=r"seed is 1791; the tasks of shop-5f4d7725-15 are 0 \.\. 1790"):
        Shop().reset(1791)
    monkeypatch.setitem(sys.modules, "rank_bm25", None)
    pages._index.cache_clear()
    with pytest.raises(ModuleNotFoundError, match=r"needs rank-bm25; run: pip install 'jaxrl_llm\[llm\]'"):
        Shop().reset(0)
    monkeypatch.undo()
    assert importlib.util.find_spec("rank_bm25") is not None
