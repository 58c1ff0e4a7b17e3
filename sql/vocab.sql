-- vocab: one row a token of the teacher's vocabulary.
--
-- columns  token_id; token, as the tokenizer shows it; bytes, what it stands for; text, those bytes as UTF-8, or
--          escaped (\xE2\x96) where a token holds part of a character
-- example  SELECT * FROM vocab WHERE text = ' the'
CREATE OR REPLACE VIEW vocab AS
SELECT token_id, token, bytes, coalesce(try(decode(bytes)), bytes::VARCHAR) AS text
FROM read_parquet(coalesce(getvariable('cache'), '.') || '/vocab.parquet');
COMMENT ON VIEW vocab IS 'one row a token of the vocabulary, with the text it stands for';
