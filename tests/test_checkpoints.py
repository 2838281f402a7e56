"""save and load: every tree comes back bit by bit, every damage is found, nothing is half-written."""

import json
import os
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_trirun
from jax_trirun.checkpoints import CheckpointError, load, packed, safetensors, save


def quant_tensor(k=128, n=40, group_size=64, *, lead=(), zeros=False, dtype=jnp.float16, seed=0):
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 4, (*lead, k, n))
    shape = (*lead, 1 if group_size == -1 else k // group_size, n)
    return jax_trirun.QuantTensor(
        jax_trirun.pack(codes),
        jnp.asarray(rng.standard_normal(shape), dtype),
        jnp.asarray(rng.standard_normal(shape), dtype) if zeros else None,
        shape=(k, n),
        group_size=group_size,
    )


def model():
    return {
        "embed": jnp.asarray(np.random.default_rng(1).standard_normal((7, 5)), jnp.bfloat16),
        "layers": [
            {"up": quant_tensor(), "norm": jnp.ones(3)},
            {"up": quant_tensor(zeros=True, dtype=jnp.bfloat16, seed=2), "norm": jnp.zeros((0, 4))},
        ],
        "by_number": {0: quant_tensor(100, 3, -1, lead=(2, 3)), 1: None},
        "pair": (jnp.asarray(3, jnp.int32), {}),
    }


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.mark.parametrize("name", ["model.safetensors", "directory"])
def test_what_was_saved_comes_back_bit_by_bit(tmp_path, name):
    save(tmp_path / "new" / name, model())
    same(load(tmp_path / "new" / name), model())
    assert os.listdir(tmp_path / "new") == [name]


@pytest.mark.parametrize("tree", [quant_tensor(), jnp.arange(5), None, [], {"a": {"b": []}}])
def test_small_trees(tmp_path, tree):
    save(tmp_path / "t.safetensors", tree)
    same(load(tmp_path / "t.safetensors"), tree)


def test_64_bit_numbers_are_not_cut(tmp_path):
    tree = {"i": np.asarray([2**40, -1]), "f": np.asarray([1 / 3])}
    save(tmp_path / "t.safetensors", tree)
    same(load(tmp_path / "t.safetensors"), tree)


def test_shards_are_no_larger_than_asked_and_the_index_is_the_usual_one(tmp_path):
    save(tmp_path / "m", model(), shard_bytes=2000)
    index = json.loads((tmp_path / "m" / packed.INDEX).read_text())
    files = sorted(p.name for p in (tmp_path / "m").glob("*.safetensors"))
    assert files == sorted(set(index["weight_map"].values())) and len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    for file in files:
        arrays, _ = safetensors.read(tmp_path / "m" / file)
        assert len(arrays) == 1 or sum(a.nbytes for a in arrays.values()) <= 2000
    same(load(tmp_path / "m"), model())


def test_the_reference_implementation_reads_our_files(tmp_path):
    reference = pytest.importorskip("safetensors.numpy", reason="the package safetensors is not installed")
    tree = {"w": quant_tensor(zeros=True, dtype=jnp.float32), "b": jnp.arange(6.0).reshape(2, 3)}
    save(tmp_path / "m.safetensors", tree)
    arrays = reference.load_file(tmp_path / "m.safetensors")
    assert sorted(arrays) == ["b", "w.scales", "w.words", "w.zeros"]
    np.testing.assert_array_equal(arrays["w.words"], tree["w"].words)
    np.testing.assert_array_equal(arrays["b"], tree["b"])
    reference.save_file(arrays, tmp_path / "theirs.safetensors")
    ours, _ = safetensors.read(tmp_path / "theirs.safetensors")
    for name, array in arrays.items():
        np.testing.assert_array_equal(ours[name], array)


def edit(path, change):
    """Rewrites a file's header by change(header), leaving the data."""
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def edit_manifest(change):
    """An edit that also repairs the manifest's checksum."""

    def edited(header):
        manifest = json.loads(header["__metadata__"]["jax_trirun"])
        change(manifest)
        header["__metadata__"].update(packed._sealed(manifest))

    return edited


def small_file(tmp_path):
    path = tmp_path / "m.safetensors"
    save(path, {"w": quant_tensor(), "b": jnp.arange(6.0).reshape(2, 3)})
    return path


def test_every_cut_is_found(tmp_path):
    path = small_file(tmp_path)
    whole = path.read_bytes()
    for length in (0, 4, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"m\.safetensors: damaged or not a safetensors file"):
            load(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(CheckpointError, match=r"its tensors take .* bytes, the file has"):
        load(path)


def test_every_flipped_bit_is_found(tmp_path):
    path = small_file(tmp_path)
    whole = path.read_bytes()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    rng = np.random.default_rng(0)
    used = len(whole[:header].rstrip(b" "))  # spaces after the header mean nothing
    for at in (*rng.integers(0, used, 60), *rng.integers(header, len(whole), 60)):
        broken = bytearray(whole)
        broken[at] ^= 1 << rng.integers(0, 8)
        path.write_bytes(broken)
        try:
            got = load(path)
        except CheckpointError as error:
            assert "m.safetensors" in str(error)
        else:  # the one harmless place: metadata that nobody reads
            same(got, {"w": quant_tensor(), "b": jnp.arange(6.0).reshape(2, 3)})
            assert at < header


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h["__metadata__"].pop("jax_trirun"), "was not written by jax_trirun.checkpoints.save"),
        (lambda h: h.pop("__metadata__"), "was not written by jax_trirun.checkpoints.save"),
        (lambda h: h["__metadata__"].update(jax_trirun="{}"), "manifest is damaged or was edited"),
        (edit_manifest(lambda m: m.update(format_version=2)), "format_version is 2, this jax_trirun reads 1"),
        (edit_manifest(lambda m: m.update(layout_version=9)), "layout_version is 9, this jax_trirun reads"),
        (edit_manifest(lambda m: m["crc32"].update(c=1)), "the tensor 'c' is missing"),
        (edit_manifest(lambda m: m["crc32"].pop("b")), "the tensor 'b' is not in the manifest"),
        (edit_manifest(lambda m: m["crc32"].update(b=1)), "the tensor 'b' is damaged or was edited"),
        (lambda h: h["b"].update(shape=[3, 2]), "the tensor 'b' is damaged or was edited"),
        (lambda h: h["b"].update(dtype="I32"), "the tensor 'b' is damaged or was edited"),
        (lambda h: h["b"].update(shape=[3, 3]), r"'b' of shape \(3, 3\) needs 36 bytes"),
        (lambda h: h["b"].update(dtype="F12"), r"header cannot be read \('F12'\)"),
        (
            edit_manifest(lambda m: m["tree"]["dict"][0][1].update(group_size=32)),
            "w: QuantTensor: group_size=32 cuts K=128 into 4 groups, but scales have 2 rows",
        ),
        (edit_manifest(lambda m: m["tree"]["dict"][0][1].update(shape=[128, 41])), "w: .*N=41"),
    ],
)
def test_edited_files(tmp_path, change, message):
    path = small_file(tmp_path)
    edit(path, change)
    with pytest.raises(CheckpointError, match=message) as caught:
        load(path)
    assert str(path) in str(caught.value)


def test_broken_directories(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere: no such file"):
        load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"index\.json: no such file; .*empty holds no model"):
        load(tmp_path / "empty")
    save(tmp_path / "m", model(), shard_bytes=2000)
    index = tmp_path / "m" / packed.INDEX
    text = index.read_text()
    index.write_text(text[:-20])
    with pytest.raises(CheckpointError, match="not a readable index"):
        load(tmp_path / "m")
    index.write_text(text.replace('"model-00002', '"../model-00002'))
    with pytest.raises(CheckpointError, match="is not in the same directory"):
        load(tmp_path / "m")
    index.write_text(text)
    shard = next((tmp_path / "m").glob("model-00002*"))
    other = next((tmp_path / "m").glob("model-00003*"))
    content = shard.read_bytes()
    shard.write_bytes(other.read_bytes())
    with pytest.raises(CheckpointError, match="the index does not place the tensor"):
        load(tmp_path / "m")
    shard.write_bytes(content)
    load(tmp_path / "m")
    shard.unlink()
    with pytest.raises(FileNotFoundError, match="model-00002"):
        load(tmp_path / "m")


@pytest.mark.parametrize("name", ["m.safetensors", "m"])
def test_what_is_there_survives_a_failed_save(tmp_path, name, monkeypatch):
    path = tmp_path / name
    save(path, {"a": jnp.ones(3)})
    with pytest.raises(
        FileExistsError, match="exists; delete it, choose another name, or pass overwrite=True"
    ):
        save(path, {"a": jnp.zeros(3)})

    def fail(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="disk full"):
            save(path, {"a": jnp.zeros(3)}, overwrite=True)
    same(load(path), {"a": jnp.ones(3)})
    save(path, {"a": jnp.zeros(3)}, overwrite=True)
    same(load(path), {"a": jnp.zeros(3)})
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize(
    ("tree", "error", "message"),
    [
        ({"a": 3.0}, TypeError, "got float at 'a'"),
        ({("a",): jnp.ones(1)}, TypeError, r"keys must be str or int, got \('a',\)"),
        ({"a": np.ones(2, np.complex64)}, TypeError, "no name for dtype complex64"),
        ({"a": {"b": jnp.ones(1)}, "a.b": jnp.ones(1)}, ValueError, "two leaves are named 'a.b'"),
    ],
)
def test_trees_that_cannot_be_saved(tmp_path, tree, error, message):
    with pytest.raises(error, match=message):
        save(tmp_path / "m.safetensors", tree)
    assert os.listdir(tmp_path) == []


def test_shard_bytes_goes_with_a_directory(tmp_path):
    with pytest.raises(ValueError, match="shard_bytes needs a directory"):
        save(tmp_path / "m.safetensors", {}, shard_bytes=100)
    with pytest.raises(ValueError, match="shard_bytes must be positive, got 0"):
        save(tmp_path / "m", {}, shard_bytes=0)


# A tensor at a time, a part at a time


def test_one_weight_at_a_time(tmp_path):
    """`Packed` gives each entry as `load` does, and finds damage in an entry when it is read."""
    tree = {"layers.0.up": quant_tensor(zeros=True), "norm": jnp.ones(3), "both": {"a": quant_tensor(seed=5)}}
    save(tmp_path / "m.safetensors", tree)
    opened = packed.Packed(tmp_path / "m.safetensors")
    assert opened.names == tuple(tree)
    for name, value in tree.items():
        same(opened.read(name), value)
    data = bytearray((tmp_path / "m.safetensors").read_bytes())
    data[-1] ^= 1  # in the last tensor
    (tmp_path / "m.safetensors").write_bytes(data)
    opened = packed.Packed(tmp_path / "m.safetensors")
    same(opened.read("norm"), tree["norm"])
    with pytest.raises(CheckpointError, match=r"the tensor 'both\.a\.scales' is damaged or was edited"):
        opened.read("both")
    save(tmp_path / "list.safetensors", [jnp.ones(2)])
    with pytest.raises(CheckpointError, match="wanted a saved dict of weights, got list"):
        packed.Packed(tmp_path / "list.safetensors")


def test_parts_become_a_model_when_all_are_there(tmp_path):
    tree = {f"layers.{i}.up": quant_tensor(seed=i) for i in range(3)} | {"norm": jnp.ones(3)}
    names = list(tree)
    parts = packed.Parts(tmp_path / "model", 2)
    parts.write(1, {name: tree[name] for name in names[2:]}, {"errors": [0.5]})
    assert parts.has(1) and not parts.has(0)
    with pytest.raises(FileNotFoundError):
        parts.finish()
    with pytest.raises(FileNotFoundError, match="holds no model"):
        load(tmp_path / "model")
    parts.write(0, {name: tree[name] for name in names[:2]})
    parts.finish()
    same(load(tmp_path / "model"), tree)
    part, notes = parts.read(1)
    assert list(part) == names[2:] and notes == {"errors": [0.5]} and parts.read(0)[1] == {}
    assert sorted(os.listdir(tmp_path / "model")) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_orbax_keeps_packed_models(tmp_path):
    """QuantTensors are pytrees: Orbax writes and restores them, given the same tree of shapes."""
    orbax = pytest.importorskip("orbax.checkpoint", reason="orbax-checkpoint is not installed")
    tree = {"up": quant_tensor(), "down": [quant_tensor(zeros=True, dtype=jnp.bfloat16)], "norm": jnp.ones(3)}
    with orbax.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "orbax", tree)
        checkpointer.wait_until_finished()
        abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree)
        restored = checkpointer.restore(tmp_path / "orbax", abstract)
    same(restored, tree)
    assert restored["down"][0].shape == (128, 40) and restored["down"][0].group_size == 64
