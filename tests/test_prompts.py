"""Prompts and what becomes of them: files, embeddings against diffusers' own, the cache, rows by seeds, guidance."""

from __future__ import annotations

import json
import pickle
import shutil

import published
import pytest
import torch
from pipelines import WIDTH
from safetensors import safe_open

from gas_engine import Denoiser, Schedule, load_denoiser, load_solver, train
from gas_engine.adapters import text_encoders
from gas_engine.adapters.diffusers import load_diffusers
from gas_engine.adapters.text import Prompts, conditioning_of
from gas_engine.adapters.text_encoders import TextEncoders
from gas_engine.guidance import guided
from gas_engine.prompts import read_prompts

TEXTS = ["a red cat", "a photo of the blue house, 3 trees", "dog", "a small painting", "an old tree on a house"]
CAPTIONS = {
    "annotations": [
        {"image_id": 9, "id": 4, "caption": "later of nine"},
        {"image_id": 2, "id": 7, "caption": "  two\nlines "},
        {"image_id": 9, "id": 3, "caption": "first of nine"},
    ]
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GAS_ENGINE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "prompts"


@pytest.fixture
def texts(tmp_path):
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    return str(tmp_path / "texts.txt")


def pipeline(path):
    from diffusers import DiffusionPipeline

    loaded = DiffusionPipeline.from_pretrained(path)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def untold(path, resolution=None, **options):
    return conditioning_of(load_diffusers(str(path), resolution=resolution), **options)


def drawn(conditioning, seeds):
    return conditioning.draw(seeds, [torch.Generator().manual_seed(seed) for seed in seeds])


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "content", "prompts"),
    [
        ("a.txt", "one\n\n  two  \r\nthree", ["one", "two", "three"]),
        ("a.prompts", "\ufeffé\n", ["é"]),
        ("a.json", json.dumps(CAPTIONS), ["first of nine", "two lines"]),
        ("a.json", '["x", {"prompt": "y"}]', ["x", "y"]),
        ("a.jsonl", '{"text": "x"}\n\n"y"\n', ["x", "y"]),
        ("a.csv", 'id,Caption\n1,"a, b"\n2,c\n', ["a, b", "c"]),
        ("a.tsv", "prompt\turl\nx y\tz\n", ["x y"]),
    ],
)
def test_files_of_prompts(tmp_path, name, content, prompts):
    (tmp_path / name).write_bytes(content.encode())
    assert read_prompts(str(tmp_path / name)) == prompts


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b" \n\n", "there is no prompt in"),
        ("a.txt", b"\xff\xfe", r"no text in UTF-8 \(byte 0\)"),
        ("a.json", b'{"images": []}', "an object of images, without 'annotations'"),
        ("a.json", b'{"annotations": [{"caption": "x"}]}', "annotation 0 has no image_id, id and caption"),
        ("a.json", b'{"annotations": [', "cannot read prompts from .*a.json"),
        ("a.json", b"3", "it holds int, not a list of prompts"),
        ("a.jsonl", b'"x"\n[1]', r"prompt 1 is \[1\], no text"),
        ("a.csv", b"url,width\nx,3\n", "it has url, width, but no caption, prompt or text"),
        ("a.csv", b"id,caption\n1\n", "prompt 0 is None, no text"),
    ],
)
def test_foreign_files_of_prompts(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_prompts(str(tmp_path / name))


def test_a_prompt_itself():
    assert read_prompts(" a cat, red. ") == ["a cat, red."] and read_prompts("x" * 9000) == ["x" * 9000]
    with pytest.raises(ValueError, match=r"no file of prompts 'missing.csv'; give a file, or the prompt itself"):
        read_prompts("missing.csv")
    with pytest.raises(ValueError, match="there is no prompt in ''"):
        read_prompts("")


# By the pipeline's own documentation: what encode_prompt answers, and the places of guidance's part of it.
ANSWERS = {
    "sd15": {"text": (0, 1)},
    "sdxl": {"text": (0, 1), "pooled": (2, 3)},
    "sd3": {"text": (0, 1), "pooled": (2, 3)},
    "pixart": {"text": (0, 2), "mask": (1, 3)},
    "flux": {"text": (0, None), "pooled": (1, None)},
    "flux_schnell": {"text": (0, 0), "pooled": (1, 1)},
}


@pytest.mark.parametrize("name", ANSWERS)
def test_embeddings_are_those_of_the_pipeline(name, saved, texts):
    told = untold(saved(name), 16).told(texts, "", None)
    cond, pipe = drawn(told, [3, 2**40 + 2, 3]), pipeline(saved(name))
    more = {"sd3": {"prompt_2": None, "prompt_3": None}, "flux": {"prompt_2": None}, "flux_schnell": {"prompt_2": None}}
    if name == "sd15":
        more[name] = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
    with torch.no_grad():
        for n, row in enumerate((3, (2**40 + 2) % 5, 3)):
            wanted = pipe.encode_prompt(TEXTS[row], **more.get(name, {}))
            for key, (place, _) in ANSWERS[name].items():
                close(cond[key][n : n + 1], wanted[place])
        empty = pipe.encode_prompt("", **more.get(name, {}))
    if name == "flux":
        assert told.null is None
    else:
        assert cond.keys() == told.null.keys()
        for key, (_, place) in ANSWERS[name].items():
            close(told.null[key], empty[place])
    assert all(v.dtype == (torch.int64 if key == "mask" else torch.float32) for key, v in cond.items())


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
@pytest.mark.parametrize("negative", ["", "a blue dog"])
def test_guidance_is_that_of_the_pipeline(name, negative, saved):
    """The noise that the pipeline's own loop gives its scheduler; SDXL takes zeros for no negative prompt."""
    pipe, inputs, outputs = pipeline(saved(name)), [], []
    scale, step = pipe.scheduler.scale_model_input, pipe.scheduler.step
    pipe.scheduler.scale_model_input = lambda x, t: inputs.append((scale(x[:1], t), t)) or scale(x, t)
    pipe.scheduler.step = lambda output, *a, **k: outputs.append(output) or step(output, *a, **k)
    negatives = {"negative_prompt": negative} if negative else {}
    pipe(TEXTS[0], guidance_scale=7.5, num_inference_steps=3, output_type="latent", **negatives)
    plain = load_diffusers(str(saved(name)))
    conditioning = conditioning_of(plain).told(TEXTS[0], negative, None)
    call = plain.function.call
    labelled = Denoiser(lambda x, t, cond: call(x, t.expand(len(x)), cond), Schedule.flow(), "noise", (4, 8, 8))
    denoiser = guided(labelled, 7.5, conditioning.null)
    assert len(inputs) == len(outputs) >= 3 and conditioning.facts()["negative"] == negative
    with torch.no_grad():
        for (x, t), output in zip(inputs, outputs, strict=True):
            close(denoiser(x, t, drawn(conditioning, [0])), output)


@pytest.mark.parametrize("height", [None, 32])
def test_sizes_that_a_model_is_told(height, saved, tmp_path):
    told = untold(saved("sdxl"), height).told("a cat", "", None)
    side = height or 16
    assert drawn(told, [5, 6])["time_ids"].tolist() == [[side, side, 0, 0, side, side]] * 2
    assert told.null["time_ids"].tolist() == [[side, side, 0, 0, side, side]]


def test_guidance_as_an_input(saved, texts):
    model = untold(saved("flux"), 16)
    assert model.guidance_input and model.takes_prompts
    assert drawn(model.told(texts, "", None), [1, 2])["guidance"].tolist() == [3.5, 3.5]
    assert drawn(model.told(texts, "", 5.0), [1])["guidance"].tolist() == [5.0]
    ranged = model.told(texts, "", (2.0, 9.0))
    scales = drawn(ranged, range(40))["guidance"]
    assert 2 <= scales.min() < 3 and 8 < scales.max() <= 9 and ranged.facts()["guidance"] == [2.0, 9.0]
    assert torch.equal(drawn(ranged, [7])["guidance"], scales[7:8])
    with pytest.raises(ValueError, match="takes guidance as an input, and no negative prompt"):
        model.told(texts, "ugly", None)
    assert "guidance" not in drawn(untold(saved("flux_schnell")).told(texts, "", None), [1])


def test_encoders_run_once(saved, texts, tmp_path, monkeypatch, cache):
    """A second run loads none; a longer list encodes what is new; damaged files are made again, to the same numbers."""
    monkeypatch.setattr(text_encoders, "CHUNK", 2)
    monkeypatch.setattr("gas_engine.adapters.text.CHUNK", 2)
    calls, own = [], TextEncoders._call
    monkeypatch.setattr(TextEncoders, "_call", lambda self, *a: calls.append(a[0]) or own(self, *a))
    model = untold(saved("sd15"))
    first = drawn(model.told(texts, "", None), range(5))
    assert calls == [TEXTS[:2], TEXTS[2:4], TEXTS[4:], [""]] and "pipeline" not in vars(model.encoders)
    assert all(not path.name.endswith(".tmp.safetensors") for path in cache.iterdir())

    def again(source=texts, negative=""):
        calls.clear()
        return untold(saved("sd15")).told(source, negative, None)

    with monkeypatch.context() as m:
        m.setattr(TextEncoders, "pipeline", property(lambda self: pytest.fail("encoders were loaded")))
        assert torch.equal(drawn(again(), range(5))["text"], first["text"])
    (tmp_path / "more.txt").write_text("\n".join([*TEXTS[:4], "dog", "cat"]))
    again(str(tmp_path / "more.txt"), "ugly")
    assert calls == [["dog", "cat"], [""]]
    told = again()
    for damage in (lambda b: b[:-7], lambda b: b[:-7] + bytes(7), lambda b: b""):
        path = told.files[1]
        path.write_bytes(damage(path.read_bytes()))
        assert torch.equal(drawn(again(), range(5))["text"], first["text"]) and calls == [TEXTS[2:4]]
    monkeypatch.setattr(TextEncoders, "fingerprint", "of other weights")
    again()
    assert len(calls) == 4


def test_an_interrupted_run_goes_on(saved, texts, monkeypatch):
    monkeypatch.setattr(text_encoders, "CHUNK", 2)
    monkeypatch.setattr("gas_engine.adapters.text.CHUNK", 2)
    calls, own = [], TextEncoders._call

    def call(self, batch, *more):
        calls.append(batch)
        if calls.count(TEXTS[2:4]) == 1 and batch == TEXTS[2:4]:
            raise KeyboardInterrupt
        return own(self, batch, *more)

    monkeypatch.setattr(TextEncoders, "_call", call)
    model = untold(saved("sd15"))
    with pytest.raises(KeyboardInterrupt):
        model.told(texts, "", None)
    assert "pipeline" not in vars(model.encoders)
    model.told(texts, "", None)
    assert calls == [TEXTS[:2], TEXTS[2:4], TEXTS[2:4], TEXTS[4:], [""]]


def test_kept_as_the_encoders_were_saved(saved, texts):
    """In half precision, half the bytes; rows are float32 all the same."""
    wide = untold(saved("sdxl")).told(texts, "", None)
    half = untold(saved("sdxl"), dtype=torch.bfloat16).told(texts, "", None)
    with safe_open(wide.files[0], "pt") as a, safe_open(half.files[0], "pt") as b:
        assert a.get_tensor("text").dtype == torch.float32 and b.get_tensor("text").dtype == torch.bfloat16
        assert a.get_slice("text").get_shape() == [5, 16, 2 * WIDTH]
    a, b = drawn(wide, range(5))["text"], drawn(half, range(5))["text"]
    assert b.dtype == torch.float32 and 0 < (a - b).norm() / a.norm() < 0.02


def test_clear_words(saved, monkeypatch, tmp_path):
    model = untold(saved("sd15"))
    for ask in (lambda: model.told(None, "", None), lambda: drawn(model, [1])):
        with pytest.raises(ValueError, match="sd15 is told by text; say by which: --prompts FILE or TEXT"):
            ask()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GAS_ENGINE_CACHE", str(tmp_path / "file"))
    with pytest.raises(ValueError, match=r"cannot be kept in .*; name a directory in GAS_ENGINE_CACHE"):
        model.told("a cat", "", None)
    monkeypatch.setenv("GAS_ENGINE_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    untold(saved("sd15")).told("a cat", "", None)
    assert len(list((tmp_path / "xdg" / "gas_engine" / "prompts").glob("*.safetensors"))) == 2


def test_encoders_of_another_library_and_lengths_that_nobody_has(saved, tmp_path):
    path = tmp_path / "foreign"
    shutil.copytree(saved("sd15"), path)
    index = json.loads((path / "model_index.json").read_text())
    index["text_encoder"] = ["mypackage", "Encoder"]
    (path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"the text_encoder of .* is Encoder of 'mypackage', code that is not run"):
        untold(path).told("a cat", "", None)
    with pytest.raises(ValueError, match=r"a text length of 5 is of a T5 encoder, and .* has none"):
        load_denoiser(str(saved("sd15")), text_length=5)


@pytest.mark.parametrize("kept", [None, "tokenizer_config.json"])
def test_half_a_tokenizer(kept, saved, tmp_path):
    """transformers makes an empty one, to which all words are unknown."""
    shutil.copytree(saved("sd15"), tmp_path / "p")
    for file in (tmp_path / "p" / "tokenizer").iterdir():
        if file.name != kept:
            file.unlink()
    with pytest.raises(ValueError, match="tokenizer is not whole: it has no"):
        untold(tmp_path / "p").told("a cat", "", None)


def test_classes_by_name(saved):
    every = untold(saved("dit"))
    assert every.classes == 1000 and every.null.tolist() == [1000] and every.told(None) is every
    assert len(set(drawn(every, range(30)).tolist())) > 20
    two = every.told("goldfish")
    assert drawn(two, [0, 2**41]).tolist() == [1, 1] and two.facts() == {"classes": [1]}
    assert every.told("Carassius auratus").only == [1] and every.told("207").only == [207]
    with pytest.raises(ValueError, match="'cat' is no class of this model; it has tench, Tinca tinca; goldfish"):
        every.told("cat")
    with pytest.raises(ValueError, match="takes no negative prompt"):
        every.told(None, "ugly")


def test_a_published_set_trains_on_its_own_prompts(saved, tmp_path, no_pictures, monkeypatch):
    """Its rows are told what they were made with, and so are the seeds that measure, where nothing else is given."""
    monkeypatch.setattr("gas_engine.pictures.pictures_of", lambda denoiser, states, device="cpu": states)
    (tmp_path / "dataset.pkl").write_bytes(pickle.dumps(published.teacher_set(3, TEXTS.__getitem__, shape=(4, 8, 8))))
    seen, plain = [], Prompts.draw
    monkeypatch.setattr(
        Prompts, "draw", lambda self, *given: seen.append((self.texts, given[0])) or plain(self, *given)
    )
    train.main([
        "--model", str(saved("sd15")), "--teacher-set", str(tmp_path / "dataset.pkl"), "--train-seeds", "0,2",
        "--guidance", "7.5", "--iterations", "2", "--batch", "2", "--steps", "2", "--selection", "2", "--held-out", "2",
        "--evaluation", "student", "--logger", "none", "--device", "cpu", "--out", str(tmp_path / "run"),
    ])  # fmt: skip
    trained = [seeds for texts, seeds in seen if texts == [TEXTS[0], TEXTS[2]]]
    assert len(trained) == 2 and all(sorted(rows) == [0, 1] for rows in trained)
    assert load_solver(tmp_path / "run" / "solver.safetensors").facts["count"] == 3
