-- near_deterministic_share: how often the teacher is almost certain, by source, task and origin.
--
-- columns     source, task, origin: the group
--             positions: number of positions
--             over_50, over_90, over_99 (share): positions whose best token has a probability
--               above 0.5, 0.9 or 0.99
--             entropy (nats): mean of the teacher's distribution, a lower bound
-- example     SELECT * FROM near_deterministic_share WHERE origin = 'given'
CREATE OR REPLACE VIEW near_deterministic_share AS
WITH unnested AS (
    SELECT
        source, task, origin,
        unnest(list_transform(candidate_logprobs, lambda logprobs: exp(logprobs[1]))) AS best_probability,
        unnest(entropies) AS entropy
    FROM samples
)
SELECT
    source, task, origin, count(*) AS positions,
    round(avg((best_probability > 0.5)::INTEGER), 4) AS over_50,
    round(avg((best_probability > 0.9)::INTEGER), 4) AS over_90,
    round(avg((best_probability > 0.99)::INTEGER), 4) AS over_99,
    round(avg(entropy), 3) AS entropy
FROM unnested GROUP BY ALL ORDER BY ALL;
COMMENT ON VIEW near_deterministic_share IS 'share of positions whose best token is almost certain, and mean entropy';
