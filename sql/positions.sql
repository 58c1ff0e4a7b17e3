-- positions: one row a completion token.
--
-- columns  sample_id, source, split, task, origin; position (1-based); token_id, text; logprob (nats) and rank of the
--          token; entropy (nats, a lower bound); tail_logprob, tail_mass: what the candidates leave out (threshold:TAU:
--          what all those leave out that were captured, the drawn ones and the others); supervised
-- example  SELECT text, logprob, rank, entropy FROM positions WHERE sample_id = 'builtin:en-001:g' ORDER BY position
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
COMMENT ON VIEW positions IS 'one row a completion token: its log-probability, rank, entropy and tail mass';
