-- token_ranks: where the completion's own token ranks in the teacher's distribution.
--
-- columns     origin: given or sampled
--             rank: 1, 2, 3, 4, 5-8, 9-16, ...; 1 is the teacher's best token
--             positions: number of positions
--             share: of all positions of that origin
--             mean_logprob (nats): of those tokens
-- example     SELECT * FROM token_ranks WHERE origin = 'given'
CREATE OR REPLACE VIEW token_ranks AS
WITH bucketed AS (
    SELECT
        origin, logprob,
        CASE WHEN rank <= 3 THEN rank ELSE 2 ** ceil(log2(rank)) END::BIGINT AS up_to
    FROM positions
)
SELECT
    origin,
    CASE WHEN up_to <= 3 THEN up_to::VARCHAR WHEN up_to = 4 THEN '4' ELSE format('{}-{}', up_to // 2 + 1, up_to) END
        AS rank,
    count(*) AS positions,
    round(count(*) / sum(count(*)) OVER (PARTITION BY origin), 4) AS share,
    round(avg(logprob), 3) AS mean_logprob
FROM bucketed GROUP BY origin, up_to ORDER BY origin, up_to;
COMMENT ON VIEW token_ranks IS 'where the completion''s own token ranks with the teacher';
