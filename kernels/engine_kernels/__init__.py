"""Operations for partly frozen vocabularies, one folder an operation. This version has none yet."""
