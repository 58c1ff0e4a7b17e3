-- captured_mass: how much of the teacher's probability the k best candidates hold.
--
-- columns  k; mass: mean over positions of the k best candidates' probability; worst_percentile: the mass that 99% of
--          positions exceed; positions
-- example  SELECT * FROM captured_mass WHERE k IN (1, 8, 16, 32, 64)
CREATE OR REPLACE VIEW captured_mass AS
WITH cumulated AS (
    SELECT candidate AS k, sum(probability) OVER (PARTITION BY sample_id, position ORDER BY candidate) AS mass
    FROM candidates
)
SELECT
    k, round(avg(mass), 4) AS mass, round(approx_quantile(mass, 0.01), 4) AS worst_percentile, count(*) AS positions
FROM cumulated GROUP BY k ORDER BY k;
COMMENT ON VIEW captured_mass IS 'how much of the probability the k best candidates hold, by k';
