-- entropy_histogram: how uncertain the teacher is: completion tokens by the entropy of its distribution.
--
-- columns     origin: given or sampled
--             entropy (nats): lower edge of a bucket that is 0.25 nats wide
--             positions: number of positions
--             share: of all positions of that origin
-- note        Entropies are those of what was captured: a lower bound of the whole vocabulary's.
-- example     SELECT * FROM entropy_histogram WHERE origin = 'given'
CREATE OR REPLACE VIEW entropy_histogram AS
WITH each AS (SELECT origin, unnest(entropies) AS nats FROM samples),
bucketed AS (SELECT origin, floor(nats * 4) / 4 AS entropy FROM each)
SELECT
    origin, entropy, count(*) AS positions,
    round(count(*) / sum(count(*)) OVER (PARTITION BY origin), 4) AS share
FROM bucketed GROUP BY origin, entropy ORDER BY origin, entropy;
COMMENT ON VIEW entropy_histogram IS 'completion tokens by the entropy of the teacher''s distribution';
