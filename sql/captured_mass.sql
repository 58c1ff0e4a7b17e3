-- captured_mass: how much of the teacher's probability the k best candidates hold.
--
-- parameters  k: how many candidates of a position are counted (all of them, where it has fewer)
-- columns  k; mass: mean over positions of the k best candidates' probability; worst_percentile: the mass that 99% of
--          positions reach; positions
-- note     in a threshold:TAU cache a candidate drawn from those below TAU is stored with probability TAU, and stands
--          for others that were not drawn: once k reaches them, the mass is more than that of the k best tokens
-- example  SELECT * FROM captured_mass(8)
CREATE OR REPLACE MACRO captured_mass(k) AS TABLE
WITH masses AS (
    SELECT unnest(list_transform(
        candidate_logprobs, lambda logprobs: list_sum(list_transform(logprobs[:k], lambda logprob: exp(logprob)))
    )) AS mass
    FROM samples
), rounded AS (  -- so few that no position need be held
    SELECT round(mass, 4) AS worst, sum(mass) AS sum, count(*) AS positions FROM masses GROUP BY worst
), ranked AS (
    SELECT *, sum(positions) OVER (ORDER BY worst) AS below, sum(positions) OVER () AS total FROM rounded
)
SELECT
    k AS k, round(sum(sum) / sum(positions), 4) AS mass,
    min(worst) FILTER (below >= 0.01 * total) AS worst_percentile, coalesce(sum(positions), 0)::BIGINT AS positions
FROM ranked;
COMMENT ON MACRO TABLE captured_mass IS 'how much of the probability the k best candidates hold';
