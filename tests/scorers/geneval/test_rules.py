"""GenEval's rules and Flow-GRPO's rewards, against values computed by executing the official functions."""

from __future__ import annotations

import pytest

from ramctl.errors import DataError
from ramctl.scorers.geneval.rules import Detection, extra_objects, judge, parse_task, relations, select

LEFT, MIDDLE, RIGHT = (0, 0, 100, 100), (150, 0, 250, 100), (300, 0, 400, 100)


def found(name, number, color=None, box=LEFT, score=0.99):
    return [Detection(name, score, box, color)] * number


def task(tag, *include, exclude=()):
    rows = [{"count": 1, **clause} for clause in include]
    return parse_task({"tag": tag, "include": rows, "exclude": list(exclude)})


def verdict(detections, wanted, partial="flow_grpo"):
    result = judge(detections, wanted, partial=partial)
    return result.official, result.strict, pytest.approx(result.partial, abs=1e-4)


SINGLE = task("single_object", {"class": "dog"})
COUNTING = task("counting", {"class": "dog", "count": 3}, exclude=[{"class": "dog", "count": 4}])
TWO = task("two_object", {"class": "dog"}, {"class": "cat"})
COLORS = task("colors", {"class": "dog", "color": "red"})
COLOR_ATTR = task("color_attr", {"class": "dog", "color": "red"}, {"class": "cat", "color": "blue"})
POSITION = task("position", {"class": "cat"}, {"class": "dog", "position": ["left of", 0]})


@pytest.mark.parametrize(
    ("number", "official", "strict", "flow_grpo", "clamped"),
    [
        (0, False, False, 0, 0),
        (1, True, True, 1, 1),
        (2, True, False, 0, 0),
        (5, True, False, -3, 0),
        (16, True, False, -14, 0),
        (40, True, False, -14, 0),
    ],
)
def test_single_object(number, official, strict, flow_grpo, clamped):
    assert verdict(found("dog", number), SINGLE) == (official, strict, flow_grpo)
    assert verdict(found("dog", number), SINGLE, "clamped") == (official, strict, clamped)


@pytest.mark.parametrize(
    ("number", "right", "flow_grpo", "clamped"),
    [
        (0, False, 0, 0),
        (1, False, 0.3333, 0.3333),
        (2, False, 0.6667, 0.6667),
        (3, True, 1, 1),
        (4, False, 0.6667, 0.6667),
        (7, False, -0.3333, 0),
    ],
)
def test_counting(number, right, flow_grpo, clamped):
    assert verdict(found("dog", number), COUNTING) == (right, right, flow_grpo)
    assert verdict(found("dog", number), COUNTING, "clamped") == (right, right, clamped)


@pytest.mark.parametrize(
    ("dogs", "cats", "official", "strict", "flow_grpo", "clamped"),
    [
        (1, 1, True, True, 1, 1),
        (1, 0, False, False, 0.5, 0.5),
        (0, 0, False, False, 0, 0),
        (2, 1, True, False, 0.5, 0.5),
        (3, 1, True, False, 0, 0.5),
    ],
)
def test_two_objects(dogs, cats, official, strict, flow_grpo, clamped):
    detections = found("dog", dogs) + found("cat", cats)
    assert verdict(detections, TWO) == (official, strict, flow_grpo)
    assert verdict(detections, TWO, "clamped") == (official, strict, clamped)


@pytest.mark.parametrize(
    ("colors", "official", "strict", "partial"),
    [
        (["red"], True, True, 1),
        (["blue"], False, False, 0.5),
        ([None], False, False, 0.5),
        (["red", "blue"], True, False, 0),
        ([], False, False, 0),
    ],
)
def test_colors(colors, official, strict, partial):
    detections = [d for color in colors for d in found("dog", 1, color)]
    for mode in ("flow_grpo", "clamped"):
        assert verdict(detections, COLORS, mode) == (official, strict, partial)


@pytest.mark.parametrize(
    ("dog", "cat", "right", "partial"),
    [("red", "blue", True, 1), ("red", "red", False, 0.75), ("blue", "red", False, 0.5)],
)
def test_color_attribution(dog, cat, right, partial):
    detections = found("dog", 1, dog) + found("cat", 1, cat)
    for mode in ("flow_grpo", "clamped"):
        assert verdict(detections, COLOR_ATTR, mode) == (right, right, partial)


@pytest.mark.parametrize(
    ("dogs", "cats", "official", "strict", "flow_grpo", "clamped"),
    [
        ([LEFT], [RIGHT], True, True, 1, 1),
        # Flow-GRPO appends a 1 after the 0 of the failed pair; clamped counts the check once.
        ([RIGHT], [LEFT], False, False, 0.75, 0.6667),
        ([LEFT], [], False, False, 0.3333, 0.3333),
        ([LEFT, MIDDLE], [RIGHT], True, False, 0.3333, 0.3333),
    ],
)
def test_position(dogs, cats, official, strict, flow_grpo, clamped):
    detections = [Detection("dog", 0.99, box) for box in dogs] + [Detection("cat", 0.99, box) for box in cats]
    assert verdict(detections, POSITION) == (official, strict, flow_grpo)
    assert verdict(detections, POSITION, "clamped") == (official, strict, clamped)


def test_clause_with_colour_and_position_and_a_wrong_count():
    wanted = task("position", {"class": "cat"}, {"class": "dog", "color": "red", "position": ["left of", 0]})
    detections = found("cat", 1, box=RIGHT)
    # Flow-GRPO: 1, 0 and one extra 0; one term per check: 1, 0, 0, 0.
    assert verdict(detections, wanted) == (False, False, 0.3333)
    assert verdict(detections, wanted, "clamped") == (False, False, 0.25)


def test_clamped_reward_never_leaves_its_range():
    for wanted in (SINGLE, COUNTING, TWO, COLORS, COLOR_ATTR, POSITION):
        for dogs in range(0, 20, 3):
            for cats in range(0, 20, 3):
                reward = judge(found("dog", dogs, "red") + found("cat", cats, "blue"), wanted).partial
                assert 0 <= reward <= 1


def test_all_objects_of_a_clause_need_its_colour():
    wanted = task("counting", {"class": "dog", "count": 3, "color": "red"})
    two_red = found("dog", 2, "red") + found("dog", 1, "blue")
    assert verdict(found("dog", 3, "red"), wanted) == (True, True, 1)
    assert verdict(two_red, wanted) == (False, False, 0.8333)
    assert verdict(two_red, wanted, "clamped") == (False, False, 0.8333)


def test_official_looks_at_the_most_confident_objects():
    wrong_first = found("dog", 1, "red", score=0.5) + found("dog", 1, "blue", score=0.9)
    assert not judge(wrong_first, COLORS).official
    right_first = found("dog", 1, "red", score=0.9) + found("dog", 1, "blue", score=0.5)
    assert judge(right_first, COLORS).official


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (LEFT, (300, 0, 400, 100), {"left of"}),
        (LEFT, (90, 0, 190, 100), {"left of"}),
        (LEFT, (10, 0, 110, 100), set()),
        (LEFT, (200, 200, 300, 300), {"left of", "above"}),
        (LEFT, (200, 60, 300, 160), {"left of"}),
        (LEFT, (200, 400, 300, 500), {"above"}),
        (LEFT, LEFT, set()),
        (LEFT, (0, 25, 100, 125), set()),
        ((0, 0, 200, 100), (100, 0, 300, 100), {"left of"}),
        (LEFT, (150, 150, 250, 350), {"left of", "above"}),
        ((300, 0, 400, 100), (0, 0, 100, 100), {"right of"}),
        ((0, 300, 100, 400), (0, 0, 100, 100), {"below"}),
    ],
)
def test_relations(a, b, expected):
    assert relations(a, b) == expected


def test_thresholds_are_strict_and_counting_is_stricter():
    assert not judge(found("dog", 1, score=0.3), SINGLE).strict
    assert judge(found("dog", 1, score=0.31), SINGLE).strict
    assert not judge(found("dog", 3, score=0.9), COUNTING).strict
    assert judge(found("dog", 3, score=0.91), COUNTING).strict
    assert not judge(found("dog", 1, score=float("nan")), SINGLE).strict


def test_suppression_is_off_unless_asked_for():
    near = [Detection("dog", 0.9, (0, 0, 99, 99)), Detection("dog", 0.8, (5, 0, 104, 99))]
    other = [Detection("cat", 0.7, (0, 0, 99, 99))]
    assert len(select(near + other, 0.3)["dog"]) == 2
    suppressed = select(near + other, 0.3, max_overlap=0.8)
    assert [d.score for d in suppressed["dog"]] == [0.9]
    assert len(suppressed["cat"]) == 1
    # Inclusive pixels: intersection 95 x 100, union 105 x 100.
    assert len(select(near, 0.3, max_overlap=95 / 105 + 1e-6)["dog"]) == 2
    assert len(select(near, 0.3, max_overlap=95 / 105 - 1e-6)["dog"]) == 1


def test_reasons_name_what_is_wrong():
    assert judge(found("dog", 1), SINGLE).reasons == ()
    assert judge(found("dog", 2), SINGLE).reasons == ("expected exactly 1 dog, found 2",)
    assert "expected fewer than 4 dog, found 4" in judge(found("dog", 4), COUNTING).reasons
    assert "1 red dog, found 0 (seen: blue)" in judge(found("dog", 1, "blue"), COLORS).reasons[0]
    wrong_side = found("dog", 1, box=RIGHT) + found("cat", 1, box=LEFT)
    assert judge(wrong_side, POSITION).reasons == ("dog is not left of cat",)
    assert "no target for dog" in judge(found("dog", 1), POSITION).reasons[1]


def test_extra_objects_counts_what_nobody_asked_for():
    assert extra_objects(found("dog", 1) + found("cat", 1), TWO) == 0
    assert extra_objects(found("dog", 3) + found("bird", 2), TWO) == 4
    assert extra_objects(found("bird", 2, score=0.2), TWO) == 0
    same_class = task("color_attr", {"class": "dog", "color": "red"}, {"class": "dog", "color": "blue"})
    assert extra_objects(found("dog", 2), same_class) == 0


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"tag": "single_object"}, '"include" must list at least one object'),
        ({"tag": "single_object", "include": []}, '"include" must list at least one object'),
        ({"include": [{"class": "dog", "count": 1}]}, '"tag" must be a word'),
        ({"tag": "x", "include": ["dog"]}, "include[0]"),
        ({"tag": "x", "include": [{"class": "dogg", "count": 1}]}, "Did you mean 'dog'"),
        ({"tag": "x", "include": [{"class": "mouse", "count": 1}]}, "'computer mouse'"),
        ({"tag": "x", "include": [{"count": 1}]}, "class must be a word"),
        ({"tag": "x", "include": [{"class": "dog", "count": 0}]}, "at least 1, got 0"),
        ({"tag": "x", "include": [{"class": "dog"}]}, "at least 1, got None"),
        ({"tag": "x", "include": [{"class": "dog", "count": True}]}, "at least 1, got True"),
        ({"tag": "x", "include": [{"class": "dog", "count": 1, "color": "mauve"}]}, "no color 'mauve'"),
        (
            {"tag": "x", "include": [{"class": "dog", "count": 1, "position": ["left of", 0]}]},
            "earlier clause",
        ),
        ({"tag": "x", "include": [{"class": "dog", "count": 1, "position": "left of"}]}, "position"),
        (
            {
                "tag": "x",
                "include": [{"class": "dog", "count": 1}],
                "exclude": [{"class": "dog", "count": 0}],
            },
            "exclude[0]",
        ),
        ({"tag": "x", "include": [{"class": "dog", "count": 1, "colour": "red"}]}, "Did you mean 'color'"),
        ({"tag": "x", "include": [{"class": "dog", "count": 1, "positoin": None}]}, "Did you mean 'position'"),
        ({"tag": "x", "include": [{"clas": "dog", "class": "dog", "count": 1}]}, "Did you mean 'class'"),
        ({"tag": "x", "include": [{"class": "dog", "count": 1, "zzz": 1}]}, "keys here are class, count, color, pos"),
        ({"tag": "x", "include": [{"class": "dog", "count": 1}, {"class": "cat", "count": 17}]}, 'include[1]: "count"'),
        ({"tag": "x", "include": [{"class": "dog", "count": 10**6}]}, "at most 16 objects"),
        (
            {
                "tag": "x",
                "include": [{"class": "dog", "count": 1}],
                "exclude": [{"class": "cat", "count": 1, "color": "red"}],
            },
            "exclude[0]: no rule looks at the key 'color'",
        ),
        (
            {
                "tag": "x",
                "include": [{"class": "dog", "count": 1}],
                "exclude": [{"class": "dog", "count": 17}],
            },
            "exclude[0]",
        ),
        (
            {
                "tag": "x",
                "include": [{"class": "dog", "count": 3}],
                "exclude": [{"class": "cat", "count": 1}, {"class": "dog", "count": 3}],
            },
            "exclude[1]: 3 dog would be too many",
        ),
    ],
)
def test_unusable_metadata_is_refused_by_name(metadata, message):
    with pytest.raises(DataError) as error:
        parse_task(metadata, "Prompt 7", class_names=["dog", "cat", "computer mouse"], colors=["red", "blue"])
    assert str(error.value).startswith("Prompt 7")
    assert message in str(error.value)


@pytest.mark.parametrize(("relation", "target"), [("left of", 1), ("left of", 2), ("left of", -1), ("near", 0)])
def test_positions_out_of_range_or_forward_are_refused(relation, target):
    include = [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": [relation, target]}]
    with pytest.raises(DataError, match=r"include\[1\]"):
        parse_task({"tag": "position", "include": include})


@pytest.mark.parametrize(
    "metadata",
    [
        # As a table (Parquet) gives the official records back: every column in every clause, null where unset.
        {
            "tag": "counting",
            "include": [{"class": "dog", "count": 3, "color": None, "position": None}],
            "exclude": [{"class": "dog", "count": 4, "color": None, "position": None}],
        },
        # Beside the rules' own keys a record may hold anything.
        {
            "tag": "single_object",
            "include": [{"class": "dog", "count": 1}],
            "exclude": None,
            "prompt": "a photo of a dog",
            "id": 7,
            "colour": "no condition",
        },
        {"tag": "counting", "include": [{"class": "dog", "count": 16}]},
        {"tag": "x", "include": [{"class": "dog", "count": 2}], "exclude": [{"class": "cat", "count": 1}]},
    ],
)
def test_legal_records_stay_legal(metadata):
    task = parse_task(metadata, class_names=["dog", "cat"], colors=["red"])
    assert task.include[0].class_name == "dog"
    assert task.include[0].color is None and task.include[0].relation is None
    assert len(task.exclude) == len(metadata.get("exclude") or ())
