-- disagreements: where the teacher's best token is not the token given, most confident first.
--
-- columns  sample_id, source, split, task, origin; position (1-based); before: the five tokens before; text: the token
--          given, and its probability; best: the teacher's best token (candidate 1), and best_probability
-- example  SELECT before, text, probability, best, best_probability FROM disagreements WHERE origin = 'given' LIMIT 10
CREATE OR REPLACE VIEW disagreements AS
WITH unnested AS (
    SELECT
        sample_id, source, split, task, origin,
        generate_subscripts(completion_ids, 1) AS position,
        unnest(completion_ids) AS token_id,
        unnest(token_logprobs) AS logprob,
        unnest(list_transform(candidate_ids, lambda ids: ids[1])) AS best_id,
        unnest(list_transform(candidate_logprobs, lambda logprobs: logprobs[1])) AS best_logprob
    FROM samples
), placed AS (
    SELECT
        unnested.*, text,
        string_agg(text, '') OVER (
            PARTITION BY sample_id ORDER BY position ROWS BETWEEN 5 PRECEDING AND 1 PRECEDING
        ) AS before
    FROM unnested LEFT JOIN vocab USING (token_id)
)
SELECT
    sample_id, source, split, task, origin, position, before, placed.text, exp(logprob) AS probability,
    vocab.text AS best, exp(best_logprob) AS best_probability
FROM placed LEFT JOIN vocab ON vocab.token_id = best_id
WHERE placed.token_id <> best_id
ORDER BY best_logprob DESC, sample_id, position;
COMMENT ON VIEW disagreements IS 'where the teacher''s best token is not the token given, most confident first';
