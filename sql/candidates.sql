-- candidates: the teacher's candidates, one row per candidate of a completion token.
--
-- columns     sample_id, source, split, task, origin: of the sample
--             position: place in the completion, from 1
--             candidate: place among the candidates, 1 for the teacher's best token
--             token_id, text: the candidate
--             logprob (nats), probability: the teacher's, as stored
--             is_given: whether the candidate is the completion's own token
-- note        In a `threshold:TAU` cache the candidates below TAU are a random sample. Each is
--             stored with probability TAU and stands for others that were not drawn.
-- example     SELECT candidate, text, probability FROM candidates
--             WHERE sample_id = 'builtin:en-001:g' AND position = 1 ORDER BY candidate LIMIT 5
CREATE OR REPLACE VIEW candidates AS
WITH by_position AS (
    SELECT
        sample_id, source, split, task, origin,
        generate_subscripts(completion_ids, 1) AS position,
        unnest(completion_ids) AS given_id,
        unnest(candidate_ids) AS ids,
        unnest(candidate_logprobs) AS logprobs
    FROM samples
), unnested AS (
    SELECT
        sample_id, source, split, task, origin, position, given_id,
        generate_subscripts(ids, 1) AS candidate,
        unnest(ids) AS token_id,
        unnest(logprobs) AS logprob
    FROM by_position
)
SELECT
    sample_id, source, split, task, origin, position, candidate, token_id, text,
    logprob, exp(logprob) AS probability, token_id = given_id AS is_given
FROM unnested LEFT JOIN vocab USING (token_id);
COMMENT ON VIEW candidates IS 'one row per candidate of a completion token, with its probability';
