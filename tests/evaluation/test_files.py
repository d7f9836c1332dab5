"""Damaged data: one sentence that names file and record, or a counted list; never silence."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmefficient.errors import InputError
from mmefficient.evaluation import run_eval, tasks
from mmefficient.vlm import VLM

FIXTURES = Path(__file__).parent / "fixtures"
Damage = Callable[[bytes], bytes]


def edit(change: Callable[[Any], None]) -> Damage:
    def damage(content: bytes) -> bytes:
        value = json.loads(content)
        change(value)
        return json.dumps(value).encode()

    return damage


def swap(old: bytes, new: bytes) -> Damage:
    def damage(content: bytes) -> bytes:
        assert old in content
        return content.replace(old, new, 1)

    return damage


def first_question(**fields: Any) -> Damage:
    return edit(lambda value: value["questions"][0].update(fields))


TABLE = "mmbench_dev_20230712.tsv"
VQA_Q, VQA_A = "v2_OpenEnded_mscoco_val2014_questions.json", "v2_mscoco_val2014_annotations.json"
MME = "MME_Benchmark_release_version"

# task, file, damage, the sentence, how many records remain when bad ones are skipped
BAD_RECORDS: list[tuple[str, str, Damage, str, int]] = [
    ("pope", "coco_pope_random.json", swap(b'"label": "yes"', b'"label": "maybe"'),
     r'coco_pope_random.json, line 1: the field "label" must be one of yes, no, but is \'maybe\'', 7),
    ("pope", "coco_pope_random.json", swap(b'"text"', b'"query"'), r'line 1: the field "text" is missing', 7),
    ("pope", "coco_pope_random.json", swap(b'{"question_id": 2', b'{"question_id": 1'),
     r'line 2: its id "random/1" is that of coco_pope_random.json, line 1', 7),
    ("pope", "coco_pope_random.json", swap(b"{", b""), r"line 1: it is not JSON", 7),
    ("pope", "coco_pope_random.json", swap(b"snowboard", b"snowb\xf6ard"), r"line 1: it is not UTF-8", 7),
    ("pope", "coco_pope_random.json", lambda content: content + b"[1]\n", r"line 5: it is not an object", 8),
    ("pope", "coco_pope_adversarial.json", edit(lambda rows: rows[1].pop("question_id")),
     r'adversarial.json, record 2: the field "question_id" is missing', 7),
    ("pope", "coco_pope_adversarial.json", edit(lambda rows: rows[1].update(image="gone.jpg")),
     r"record 2: there is no picture gone.jpg in .* \(val2014 or images", 7),
    ("pope", "coco_pope_adversarial.json", edit(lambda rows: rows[1].update(text="  ")),
     r'record 2: the field "text" must be a text that is not empty', 7),
    ("pope", "coco_pope_adversarial.json", edit(lambda rows: rows[1].update(question_id=True)),
     r'record 2: the field "question_id" must be a text', 7),
    ("chair", "annotations/instances_val2014.json", edit(lambda v: v["annotations"][3].update(category_id=99)),
     r"instances_val2014.json, annotations 4: its category 99 is none of the file's", 3),
    ("chair", "annotations/instances_val2014.json", edit(lambda v: v["categories"][1].update(name="unicorn")),
     r'categories 2: the category "unicorn" is not one of COCO', 3),
    ("chair", "annotations/instances_val2014.json", edit(lambda v: v["images"][1].update(id=42)),
     r'images 2: its id "42" is that of annotations/instances_val2014.json, images 1', 2),
    ("chair", "annotations/captions_val2014.json", edit(lambda v: v["annotations"].pop()),
     r"image 74: no caption file describes this picture", 2),
    ("chair", "annotations/captions_val2014.json", edit(lambda v: v["annotations"][0].update(caption=3)),
     r'captions_val2014.json, annotations 1: the field "caption" must be a text', 3),
    ("vqav2", VQA_A, edit(lambda v: v["annotations"].pop()), r"questions.json, questions 2: no annotation has its", 2),
    ("vqav2", VQA_A, edit(lambda v: v["annotations"].append(v["annotations"][0])),
     r'annotations.json, annotations 4: its question_id "393225000" is that of .*annotations 1', 3),
    ("vqav2", VQA_A, edit(lambda v: v["annotations"][0]["answers"].pop()), r'"answers" must hold 10 answers', 2),
    ("vqav2", VQA_A, edit(lambda v: v["annotations"][0]["answers"][0].update(answer=None)), r"must hold 10 answers", 2),
    ("vqav2", VQA_Q, first_question(image_id="262148"), r'questions 1: the field "image_id" must be a whole number', 2),
    ("vqav2", VQA_Q, first_question(question_id=None), r'questions 1: the field "question_id" must be a text', 2),
    ("vqav2", VQA_Q, first_question(question_id=262148001), r'its id "262148001" is that of', 2),
    ("gqa", "testdev_balanced_questions.json", swap(b'"201640614": {', b'"201307251": {'),
     r'record "201307251": it occurs twice in the file', 0),
    ("gqa", "testdev_balanced_questions.json", edit(lambda v: v["201307251"].update(answer=5)), r'"answer" must be', 1),
    ("textvqa", "TextVQA_0.5.1_val.json", edit(lambda v: v["data"][0]["answers"].append("x")), r"hold 10 answers", 1),
    ("vizwiz", "val.json", edit(lambda rows: rows.append(rows[0])),
     r"record 3: its id .* is that of val.json, record 1", 2),
    ("scienceqa", "problems.json", edit(lambda v: v["4"].update(answer=4)), r'"4": its answer is choice 4 of 4', 1),
    ("scienceqa", "problems.json", edit(lambda v: v.pop("5")), r'pid_splits.json, "5": problems.json has no such', 1),
    ("scienceqa", "problems.json", edit(lambda v: v["4"].update(choices="abc")),
     r'"choices" must be a list of texts', 1),
    ("mme", f"{MME}/count/0001.txt", lambda content: content.split(b"\n")[0],
     r"count/0001.txt, line 1: its picture has 1", 26),
    ("mme", f"{MME}/OCR/0001.txt", swap(b"\tNo", b" No"),
     r"OCR/0001.txt, line 2: it must have 2 tab-separated fields", 26),
    ("mme", f"{MME}/OCR/0001.txt", swap(b"\tNo", b"\tNein"),
     r'OCR/0001.txt, line 2: the field "answer" must be one of', 27),
    ("mmbench", TABLE, swap(b"\tC\tobject", b"\tD\tobject"), r'record 2: the field "answer" must be', 2),
    ("mmbench", TABLE, swap(b"252\tWhich fruit", b"252\tWhich\tfruit"),
     r"record 2: it must have 14 tab-separated fields", 1),
    ("mmbench", TABLE, swap(b"\tpear\tplum", b"\t\tplum"), r"record 2: it has fewer than two", 2),
    ("mmbench", TABLE, swap(b"\n253\t", b"\n252\t"), r'its id "252/0" is that of', 2),
    ("mmbench", TABLE, swap(b"\n252\t", b"\nx\t"), r'its index "x" is not a whole number', 1),
    ("seedbench", "SEED-Bench.json", first_question(data_type="audio"), r'"data_type" must be one of image, video', 1),
    ("seedbench", "SEED-Bench.json", first_question(data_id="none"), r"there is no picture none", 1),
    ("amber", "data/annotations.json", edit(lambda rows: rows.pop()), r"record 5: no annotation has its id 13558", 4),
    ("amber", "data/annotations.json", edit(lambda rows: rows[1].update(type="generative")),
     r'its type "generative"', 4),
    ("docvqa", "val_v1.0_withQT.json", edit(lambda v: v["data"][0].update(answers=[])), r'"answers" must be a list', 1),
    ("docvqa", "val_v1.0_withQT.json", edit(lambda v: v["data"][0].pop("image")), r'"image" is missing', 1),
]  # fmt: skip


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[str], Path]:
    def make(name: str) -> Path:
        return Path(shutil.copytree(FIXTURES / name, tmp_path / name))

    return make


@pytest.mark.parametrize(("name", "file", "damage", "message", "left"), BAD_RECORDS)
def test_a_bad_record_is_named_or_counted(
    copy: Callable[[str], Path], name: str, file: str, damage: Damage, message: str, left: int
) -> None:
    folder = copy(name)
    (folder / file).write_bytes(damage((folder / file).read_bytes()))
    with pytest.raises(InputError, match=message) as refused:
        tasks.get(name, folder)
    assert "skip_bad" in str(refused.value)
    if not left:
        with pytest.raises(InputError, match="no record that can be used"):
            tasks.get(name, folder, skip_bad=True)
        return
    task = tasks.get(name, folder, skip_bad=True)
    assert len(task.records(None, None)) == left
    facts = task.facts()
    assert facts["skipped"] == len(facts["skipped_records"]) >= 1
    assert any(re.search(message, entry) for entry in facts["skipped_records"])


BAD_FILES: list[tuple[str, str, Damage, str]] = [
    ("gqa", "testdev_balanced_questions.json", lambda content: content[:-5], r"questions.json is not JSON"),
    ("gqa", "testdev_balanced_questions.json", lambda content: b"[]", r"must hold a JSON object with one entry per"),
    ("vqav2", VQA_Q, lambda content: content.replace(b"Where", b"W\xe9re"), r"questions.json, line \d+, is not UTF-8"),
    ("vqav2", VQA_Q, lambda content: content.decode().encode("utf-16"), r"is not UTF-8"),
    ("vqav2", VQA_Q, lambda content: b"{}", r'must hold a JSON list under "questions"; is it the official file'),
    ("docvqa", "val_v1.0_withQT.json", lambda content: b"[1]", r'must hold a JSON list under "data"'),
    ("scienceqa", "pid_splits.json", lambda content: b"{}", r'must hold a list of ids under "test"'),
    ("mmbench", TABLE, lambda content: b"\xff" + content, r"tsv, line 1, is not UTF-8"),
    ("mmbench", TABLE, lambda content: b"", r"no record that can be used \(the files hold none\)"),
    ("amber", "data/annotations.json", lambda content: b"{}", r"must hold a JSON list; is it the official file"),
]


@pytest.mark.parametrize("skip_bad", [False, True])
@pytest.mark.parametrize(("name", "file", "damage", "message"), BAD_FILES)
def test_a_bad_file_is_refused_by_name(
    copy: Callable[[str], Path], name: str, file: str, damage: Damage, message: str, skip_bad: bool
) -> None:
    folder = copy(name)
    (folder / file).write_bytes(damage((folder / file).read_bytes()))
    with pytest.raises(InputError, match=message):
        tasks.get(name, folder, skip_bad=skip_bad)


@pytest.mark.parametrize("file", ["coco_pope_random.json", "val2014"])
def test_a_missing_file_or_folder_is_named(copy: Callable[[str], Path], file: str) -> None:
    folder = copy("pope")
    target = folder / file
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    with pytest.raises(InputError, match=r"_pope_random.json|val2014 or images"):
        tasks.get("pope", folder)


def test_two_candidates_are_not_guessed_between(copy: Callable[[str], Path]) -> None:
    folder = copy("pope")
    shutil.copy(folder / "coco_pope_random.json", folder / "gqa_pope_random.json")
    with pytest.raises(InputError, match=r"several files \*_pope_random.json \(coco_.*, gqa_"):
        tasks.get("pope", folder)


def test_a_byte_order_mark_is_no_error(copy: Callable[[str], Path]) -> None:
    folder = copy("gqa")
    path = folder / "testdev_balanced_questions.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(tasks.get("gqa", folder).records(None, None)) == 2


def test_a_damaged_picture_is_named_when_it_is_reached(copy: Callable[[str], Path]) -> None:
    folder = copy("gqa")
    (folder / "images" / "n235859.jpg").write_bytes(b"no picture")
    task = tasks.get("gqa", folder)
    records = task.records(None, None)
    task.pictures(records[:1], torch.device("cpu"))
    with pytest.raises(InputError, match=r'questions.json, record "201640614": .*n235859.jpg.* not an image'):
        task.pictures(records, torch.device("cpu"))


@pytest.mark.parametrize("limit", [1, 2, None])
def test_damaged_pictures_are_skipped_beforehand(copy: Callable[[str], Path], limit: int | None) -> None:
    folder = copy("gqa")
    (folder / "images" / "n161313.jpg").write_bytes(b"no picture")
    task = tasks.get("gqa", folder, skip_bad=True)
    assert [record.id for record in task.records(None, limit)] == ["201640614"]
    task.records(None, limit)  # asking twice counts once
    assert task.facts()["skipped"] == 1


def test_a_picture_that_is_not_base64_names_its_row(copy: Callable[[str], Path]) -> None:
    folder = copy("mmbench")
    path = folder / TABLE
    path.write_bytes(path.read_bytes().replace(b"iVBORw0K", b"!!", 1))
    task = tasks.get("mmbench", folder)
    with pytest.raises(InputError, match=r"tsv, record 1: its picture is not base64"):
        task.pictures(task.records(None, 1), torch.device("cpu"))


def test_the_report_lists_what_was_skipped(copy: Callable[[str], Path], vlm: VLM, tmp_path: Path) -> None:
    folder = copy("pope")
    path = folder / "coco_pope_random.json"
    path.write_bytes(path.read_bytes().replace(b'"yes"', b'"maybe"', 1))
    with pytest.raises(InputError, match="line 1"):
        run_eval("pope", [], vlm, data=folder)
    report = run_eval("pope", [], vlm, data=folder, skip_bad=True, limit=3, resamples=10, out=tmp_path / "out")
    assert report["settings"]["skipped"] == 1
    assert "coco_pope_random.json, line 1" in (tmp_path / "out" / "report.md").read_text()


def test_hashes_of_many_files_become_one(tmp_path: Path) -> None:
    from mmefficient.evaluation.files import Files

    files = Files("x", tmp_path, lambda where, what: None)
    (tmp_path / "a").mkdir()
    paths = [tmp_path / "a" / f"{i}.txt" for i in range(9)] + [tmp_path / "b.txt"]
    for path in paths:
        path.write_text(path.name)
        files.read(path)
    before = files.summary()
    assert before.keys() == {"a/ (9 files)", "b.txt"}
    paths[3].write_text("other")
    files.read(paths[3])
    assert files.summary()["a/ (9 files)"] != before["a/ (9 files)"]


TEXT_FILES = [
    path.relative_to(FIXTURES)
    for path in sorted(FIXTURES.rglob("*"))
    if path.suffix in (".json", ".jsonl", ".tsv", ".txt")
]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.data())
def test_whatever_the_damage_it_is_refused_in_one_sentence(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Bytes cut out and put in anywhere: the loader succeeds or raises InputError, and nothing vanishes uncounted."""
    file = data.draw(st.sampled_from(TEXT_FILES))
    content = (FIXTURES / file).read_bytes()
    start = data.draw(st.integers(0, len(content)))
    stop = data.draw(st.integers(start, min(len(content), start + 40)))
    junk = data.draw(
        st.sampled_from([b"", b"\x00", b"\xff", b'"', b"null", b"[", b"{}", b"\n", b"\t", b"1e999", b"-1", b"NaN"])
    )
    name = file.parts[0]
    folder = tmp_path_factory.mktemp("fuzz") / name
    shutil.copytree(FIXTURES / name, folder)
    (folder / file.relative_to(name)).write_bytes(content[:start] + junk + content[stop:])
    for skip_bad in (False, True):
        with contextlib.suppress(InputError):
            task = tasks.get(name, folder, "llava-ocr" if file.suffix == ".jsonl" else None, skip_bad=skip_bad)
            task.records(None, None)
            assert skip_bad or not task.facts()["skipped"]
