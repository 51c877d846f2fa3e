import pytest
from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

from engine.errors import UsageError
from recipes.lib import amharic, tokenizer
from recipes.prepare_amharic import english

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(scope="module")
def base() -> SentencePieceProcessor:
    return tokenizer.train(english(), 300)


@pytest.fixture(scope="module")
def extended(base) -> SentencePieceProcessor:
    return tokenizer.extend(base, amharic.texts(), 600)


def edited(model: SentencePieceProcessor, edit) -> SentencePieceProcessor:
    proto = sentencepiece_model_pb2.ModelProto.FromString(model.serialized_model_proto())
    edit(proto)
    return SentencePieceProcessor(model_proto=proto.SerializeToString())


def test_start_and_stop_are_no_pieces_of_text(base, extended):
    for model in (base, extended):
        assert [model.id_to_piece(i) for i in range(3)] == ["<s>", "</s>", "<unk>"]
        assert [model.is_control(i) for i in range(3)] == [True, True, False]
        assert model.is_unknown(2)
        assert min(i for line in english()[:500] for i in model.encode(line)) > 2


def test_the_same_lines_give_the_same_bytes(base, extended):
    again = tokenizer.train(english(), 300)
    assert again.serialized_model_proto() == base.serialized_model_proto()
    assert tokenizer.extend(again, amharic.texts(), 600).serialized_model_proto() == extended.serialized_model_proto()


def test_an_extension_keeps_every_old_piece_and_score(base, extended):
    assert (base.get_piece_size(), extended.get_piece_size()) == (300, 600)
    for i in range(300):
        assert extended.id_to_piece(i) == base.id_to_piece(i)
        assert extended.get_score(i) == base.get_score(i)
    assert len({extended.id_to_piece(i) for i in range(600)}) == 600
    new = [extended.get_score(i) for i in range(300, 600)]
    assert new == sorted(set(new), reverse=True)
    assert new[0] < min(base.get_score(i) for i in range(300))
    tokenizer.check_extends(base, extended)


def test_old_text_keeps_its_ids_and_new_text_comes_back(base, extended):
    assert [extended.encode(line) for line in english()] == [base.encode(line) for line in english()]
    texts = amharic.texts()
    assert [extended.decode(extended.encode(text)) for text in texts] == texts
    assert all(max(extended.encode(text)) >= 300 for text in texts)
    assert tokenizer.UNKNOWN in base.encode("ሰላም")


def test_new_pieces_are_used_and_shorten_text(base, extended):
    large = tokenizer.extend(base, amharic.texts(), 3000)
    few, many = (sum(len(model.encode(text)) for text in amharic.texts()) for model in (large, extended))
    assert few < 0.7 * many


@pytest.mark.parametrize("place", [0, 2, 7, 299])
def test_the_first_moved_piece_is_named(base, extended, place):
    def edit(proto):
        proto.pieces[place].score -= 0.5
        if place > 2:
            proto.pieces[place].piece = "moved"

    with pytest.raises(UsageError, match=f"id {place} is .*, in the base "):
        tokenizer.check_extends(base, edited(extended, edit))


def test_swapped_pieces_are_told_by_the_first(base, extended):
    def edit(proto):
        proto.pieces[40].piece, proto.pieces[41].piece = proto.pieces[41].piece, proto.pieces[40].piece

    with pytest.raises(UsageError, match="id 40 is "):
        tokenizer.check_extends(base, edited(extended, edit))


def test_a_tokenizer_does_not_extend_itself_or_a_larger_one(base, extended):
    for pair in ((base, base), (extended, base)):
        with pytest.raises(UsageError, match="it has 300 pieces"):
            tokenizer.check_extends(*pair)


@pytest.mark.parametrize("size", [10, 1 << 19])
def test_an_impossible_size_is_told_with_the_possible_one(base, size):
    for make in (lambda size: tokenizer.train(english(), size), lambda size: tokenizer.extend(base, amharic.texts(), size)):
        with pytest.raises(UsageError, match=r"possible size is \d+$") as error:
            make(size)
        bound = int(str(error.value).split()[-1])
        assert make(bound).get_piece_size() == bound
        with pytest.raises(UsageError, match=f"possible size is {bound}"):
            make(bound + (1 if size > bound else -1))


def test_a_base_that_is_no_bpe_is_refused(base):
    def edit(proto):
        proto.trainer_spec.model_type = sentencepiece_model_pb2.TrainerSpec.UNIGRAM

    with pytest.raises(UsageError, match="no BPE model"):
        tokenizer.extend(edited(base, edit), amharic.texts(), 600)


@pytest.mark.parametrize("content", [None, b"", b"a text\n", b"\x80\x05cpickle"])
def test_a_file_that_is_no_model_is_told(tmp_path, content):
    path = tmp_path / "bpe.model"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=r"bpe\.model: (is no sentencepiece model|there is no such file)"):
        tokenizer.vocab_size(path)
    with pytest.raises(UsageError):
        tokenizer.load(tmp_path)


def test_a_written_model_is_read_back(tmp_path, extended):
    path = tmp_path / "bpe.model"
    path.write_bytes(extended.serialized_model_proto())
    assert tokenizer.vocab_size(path) == 600
    assert tokenizer.load(path).serialized_model_proto() == extended.serialized_model_proto()
