-- captured_mass: how much of the teacher's probability its k best candidates hold.
--
-- parameters  k: the number of candidates to count; a position with fewer counts with all it has
-- columns     k: the parameter
--             mass (probability): mean over all positions
--             worst_percentile (probability): the mass that 99% of the positions reach
--             positions: number of positions
-- note        In a `threshold:TAU` cache each candidate drawn from those below TAU counts with
--             probability TAU, because it stands for others. Once k reaches them, the mass is more
--             than that of the k best tokens.
-- example     SELECT * FROM captured_mass(8)
CREATE OR REPLACE MACRO captured_mass(k) AS TABLE
WITH masses AS (
    SELECT unnest(list_transform(
        candidate_logprobs, lambda logprobs: list_sum(list_transform(logprobs[:k], lambda logprob: exp(logprob)))
    )) AS mass
    FROM samples
), rounded AS (  -- to 10,000 values, so that no position is held in memory
    SELECT round(mass, 4) AS worst, sum(mass) AS sum, count(*) AS positions FROM masses GROUP BY worst
), ranked AS (
    SELECT *, sum(positions) OVER (ORDER BY worst) AS below, sum(positions) OVER () AS total FROM rounded
)
SELECT
    k AS k, round(sum(sum) / sum(positions), 4) AS mass,
    min(worst) FILTER (below >= 0.01 * total) AS worst_percentile, coalesce(sum(positions), 0)::BIGINT AS positions
FROM ranked;
COMMENT ON MACRO TABLE captured_mass IS 'how much of the probability the k best candidates hold';
