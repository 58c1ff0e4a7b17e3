-- vocab: the tokens of the teacher's vocabulary, one row per token.
--
-- columns     token_id: the id
--             token: the token as the tokenizer shows it
--             bytes: the bytes it stands for
--             text: those bytes as UTF-8, or escaped (\xE2\x96) where a token is part of a
--               character
-- example     SELECT * FROM vocab WHERE text = ' the'
CREATE OR REPLACE VIEW vocab AS
SELECT token_id, token, bytes, coalesce(try(decode(bytes)), bytes::VARCHAR) AS text
FROM read_parquet(coalesce(getvariable('cache'), '.') || '/vocab.parquet');
COMMENT ON VIEW vocab IS 'one row per token of the vocabulary, with the text it stands for';
