-- calibration: whether the teacher is right as often as it is sure, by the probability of its best token.
--
-- columns     origin: given or sampled
--             bin: range of the best token's probability
--             positions: number of positions
--             probability: mean probability of the best token
--             agreement (share): positions at which the completion's own token is the best one
--             gap: agreement - probability; below 0 the teacher is too sure
-- note        For sampled completions the gap only shows how they were drawn: it is about 0 at
--             temperature 1, and above 0 at lower temperatures.
-- example     SELECT * FROM calibration WHERE origin = 'given'
CREATE OR REPLACE VIEW calibration AS
WITH unnested AS (
    SELECT
        origin,
        unnest(completion_ids) AS token_id,
        unnest(list_transform(candidate_ids, lambda ids: ids[1])) AS best_id,
        unnest(list_transform(candidate_logprobs, lambda logprobs: exp(logprobs[1]))) AS best_probability
    FROM samples
), binned AS (
    SELECT
        origin, least(floor(best_probability * 10), 9) / 10 AS low,
        count(*) AS positions,
        avg(best_probability) AS probability,
        avg((token_id = best_id)::INTEGER) AS agreement
    FROM unnested GROUP BY ALL
)
SELECT
    origin, format('{:.1f}-{:.1f}', low, low + 0.1) AS bin, positions,
    round(probability, 4) AS probability, round(agreement, 4) AS agreement, round(agreement - probability, 4) AS gap
FROM binned ORDER BY origin, low;
COMMENT ON VIEW calibration IS 'how often the teacher''s best token was the one given, by its probability';
