-- positions: the tokens of all completions, one row per token.
--
-- columns     sample_id, source, split, task, origin: of the sample
--             position: place in the completion, from 1
--             token_id, text: the token
--             logprob (nats), rank: the teacher's log-probability of the token, and its rank, 1
--               for the best
--             entropy (nats): of the teacher's distribution, a lower bound
--             tail_logprob (nats), tail_mass (probability): what the candidates leave out
--             supervised: whether the position is trained on
-- note        In a `threshold:TAU` cache the tail is the mass beyond the captured candidates,
--             whether they were stored or not.
-- example     SELECT text, logprob, rank, entropy FROM positions
--             WHERE sample_id = 'builtin:en-001:g' ORDER BY position
CREATE OR REPLACE VIEW positions AS
WITH unnested AS (
    SELECT
        sample_id, source, split, task, origin,
        generate_subscripts(completion_ids, 1) AS position,
        unnest(completion_ids) AS token_id,
        unnest(token_logprobs) AS logprob,
        unnest(token_ranks) AS rank,
        unnest(entropies) AS entropy,
        unnest(tail_logprobs) AS tail_logprob,
        unnest(coalesce(completion_mask, list_transform(completion_ids, lambda x: true))) AS supervised
    FROM samples
)
SELECT
    sample_id, source, split, task, origin, position, token_id, text, logprob, rank, entropy,
    tail_logprob, exp(tail_logprob) AS tail_mass, supervised
FROM unnested LEFT JOIN vocab USING (token_id);
COMMENT ON VIEW positions IS 'one row per completion token: its log-probability, rank, entropy and tail mass';
