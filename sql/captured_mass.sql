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
)
SELECT
    k AS k, round(avg(mass), 4) AS mass, round(quantile_disc(mass, 0.01), 4) AS worst_percentile, count(*) AS positions
FROM masses;
COMMENT ON MACRO TABLE captured_mass IS 'how much of the probability the k best candidates hold';
