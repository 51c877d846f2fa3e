"""What every storage must do. A storage's test class inherits :class:`StorageTests` and gives it a ``storage`` fixture."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from engine.errors import CheckpointCorrupt, StorageError


def put(storage, path: str, data: bytes = b"data") -> None:
    writer = storage.create(path)
    writer.write(memoryview(data))
    writer.close()


class StorageTests:
    def test_what_is_written_is_read(self, storage):
        storage.make_folder("a/b")
        writer = storage.create("a/b/file")
        for piece in (b"one", b"", b"two" * 1000):
            writer.write(memoryview(piece))
        writer.close()
        assert storage.read("a/b/file", 10_000) == b"one" + b"two" * 1000

    def test_ranges_fill_their_targets(self, storage):
        storage.make_folder("a")
        put(storage, "a/file", bytes(range(256)))
        reader = storage.open("a/file")
        target = bytearray(10)
        reader.read_into(250, memoryview(target)[:6])
        reader.read_into(3, memoryview(target)[6:])
        reader.read_into(256, memoryview(b""))
        assert reader.size_bytes == 256
        reader.close()
        assert bytes(target) == bytes([250, 251, 252, 253, 254, 255, 3, 4, 5, 6])

    def test_a_range_past_the_end_is_corrupt_and_names_the_file(self, storage):
        storage.make_folder("a")
        put(storage, "a/file", b"12345")
        reader = storage.open("a/file")
        with pytest.raises(CheckpointCorrupt, match=r"a/file is truncated: it ends at byte 5, 2 more"):
            reader.read_into(3, memoryview(bytearray(4)))
        reader.close()

    def test_an_absent_path_is_file_not_found(self, storage):
        storage.make_folder("a")
        for act in (storage.open, lambda p: storage.read(p, 10), storage.create):
            with pytest.raises(FileNotFoundError):
                act("no/such")
        with pytest.raises(FileNotFoundError):
            storage.open("a/no")
        with pytest.raises(FileNotFoundError):
            storage.remove("no")

    def test_a_small_file_larger_than_its_limit_is_corrupt(self, storage):
        storage.make_folder("a")
        put(storage, "a/file", b"12345")
        assert storage.read("a/file", 5) == b"12345"
        with pytest.raises(CheckpointCorrupt, match=r"a/file has 5 bytes, at most 4"):
            storage.read("a/file", 4)

    def test_a_folder_is_not_read_as_a_file(self, storage):
        storage.make_folder("a/b")
        with pytest.raises((CheckpointCorrupt, FileNotFoundError)):
            storage.open("a/b")

    def test_create_never_overwrites(self, storage):
        storage.make_folder("a")
        put(storage, "a/file", b"first")
        with pytest.raises(StorageError, match="a/file"):
            storage.create("a/file")
        assert storage.read("a/file", 10) == b"first"

    def test_names_lists_a_folder_and_nothing_for_none(self, storage):
        storage.make_folder("a/sub")
        put(storage, "a/x")
        assert sorted(storage.names("a")) == ["sub", "x"]
        assert storage.names("none") == []

    def test_exists(self, storage):
        storage.make_folder("a")
        put(storage, "a/x")
        assert storage.exists("a/x")
        assert not storage.exists("a/y")

    def test_making_a_folder_that_exists_is_no_error(self, storage):
        storage.make_folder("a/b")
        storage.make_folder("a/b")
        storage.make_folder("")

    def test_a_folder_is_claimed_once(self, storage):
        storage.make_folder("")
        assert storage.claim_folder("a")
        assert not storage.claim_folder("a")
        assert storage.names("") == ["a"]
        put(storage, "file")
        assert not storage.claim_folder("file")
        with pytest.raises(FileNotFoundError):
            storage.claim_folder("no/such")

    def test_of_many_that_claim_a_folder_one_gets_it(self, storage):
        storage.make_folder("")
        with ThreadPoolExecutor(8) as pool:
            for i in range(20):
                claims = list(pool.map(lambda _, name=f"a{i}": storage.claim_folder(name), range(8)))
                assert sum(claims) == 1

    def test_a_renamed_folder_has_all_it_had_under_its_new_name_alone(self, storage):
        storage.make_folder("a/b")
        put(storage, "a/b/x")
        storage.rename("a", ".a.removed")
        assert storage.names("") == [".a.removed"]
        assert storage.read(".a.removed/b/x", 10) == b"data"

    @pytest.mark.parametrize("taken", ["folder", "empty", "file"])
    def test_a_name_that_is_taken_is_not_given(self, storage, taken):
        storage.make_folder("a")
        storage.make_folder("folder/b")
        storage.make_folder("empty")
        put(storage, "file")
        with pytest.raises(StorageError, match=r"cannot rename .*a: .* the name is taken"):
            storage.rename("a", taken)
        assert sorted(storage.names("")) == ["a", "empty", "file", "folder"]

    def test_renaming_what_is_not_there_is_file_not_found(self, storage):
        storage.make_folder("")
        with pytest.raises(FileNotFoundError):
            storage.rename("no", "such")

    def test_publish_shows_the_whole_folder_under_its_name(self, storage):
        storage.make_folder(".step.1")
        put(storage, ".step.1/x", b"new")
        storage.publish(".step.1", "step")
        assert storage.read("step/x", 10) == b"new"
        assert ".step.1" not in storage.names("")

    def test_publish_replaces_a_folder_leaving_nothing_of_it(self, storage):
        for attempt, name in ((".step.1", "old"), (".step.2", "new")):
            storage.make_folder(attempt)
            put(storage, f"{attempt}/{name}", name.encode())
            storage.publish(attempt, "step")
        assert storage.names("step") == ["new"]
        assert storage.names("") == ["step"]

    def test_point_replaces_a_text_whole(self, storage):
        storage.make_folder("a")
        for text in ("a longer text\n", "short\n"):
            storage.point("latest", text, "a")
            assert storage.read("latest", 100) == text.encode()
        assert sorted(storage.names("")) == ["a", "latest"]
        assert storage.names("a") == []

    def test_nothing_is_pointed_out_of_a_folder_that_is_gone(self, storage):
        storage.make_folder("a")
        storage.point("latest", "old\n", "a")
        storage.rename("a", "b")
        with pytest.raises(FileNotFoundError):
            storage.point("latest", "new\n", "a")
        assert storage.read("latest", 100) == b"old\n"

    def test_nothing_is_published_out_of_a_folder_that_is_gone(self, storage):
        storage.make_folder("a/attempt")
        storage.make_folder("step")
        put(storage, "step/x")
        storage.rename("a", "b")
        for name in ("step", "other"):
            with pytest.raises(FileNotFoundError):
                storage.publish("a/attempt", name)
        assert storage.names("step") == ["x"]
        assert not storage.exists("other")

    def test_a_file_is_known_by_its_stamp(self, storage):
        storage.make_folder("a")
        put(storage, "a/x")
        stamp = storage.stamp("a/x")
        assert stamp is not None
        assert storage.link("a/x", "a/y")
        assert storage.stamp("a/y") == stamp
        storage.remove("a/x")
        put(storage, "a/x", b"other")
        assert storage.stamp("a/x") != stamp
        assert storage.stamp("a/no") is storage.stamp("no/such") is storage.stamp("a") is None

    def test_only_an_empty_folder_is_dropped(self, storage):
        storage.make_folder("a")
        put(storage, "a/x")
        assert not storage.drop_folder("a")
        storage.remove("a/x")
        assert storage.drop_folder("a")
        assert not storage.drop_folder("a")
        assert storage.names("") == []

    def test_removing_a_folder_removes_all_of_it(self, storage):
        storage.make_folder("a/b")
        put(storage, "a/b/x")
        storage.remove("a")
        assert not storage.exists("a")

    def test_an_abandoned_file_does_not_stop_the_removal_of_its_folder(self, storage):
        storage.make_folder("a")
        writer = storage.create("a/x")
        writer.write(memoryview(b"part"))
        writer.abandon()
        storage.remove("a")
        assert storage.names("a") == []

    def test_synced_folders(self, storage):
        storage.make_folder("a")
        storage.sync_folder("a")
        storage.sync_folder("")
