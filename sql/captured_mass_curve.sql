-- captured_mass_curve: captured mass for k = 1, 2, 4, ... up to the most candidates that a position holds.
--
-- columns     k, mass (probability), worst_percentile (probability), positions: as in
--               captured_mass
-- note        Most positions of a `threshold:TAU` cache hold fewer candidates, and count with all
--             they have.
-- example     SELECT * FROM captured_mass_curve
CREATE OR REPLACE VIEW captured_mass_curve AS
WITH held AS (
    SELECT max(list_max(list_transform(candidate_ids, lambda ids: len(ids)))) AS most FROM samples
), steps AS (
    SELECT DISTINCT least(2 ** step, most)::BIGINT AS k FROM held, range(20) AS powers(step)
)
SELECT captured.k, mass, worst_percentile, positions
FROM steps, captured_mass(steps.k) AS captured ORDER BY captured.k;
COMMENT ON VIEW captured_mass_curve IS 'captured_mass for k = 1, 2, 4, ... up to the most candidates of a position';
