-- What revisions rely on and do not create, as statements for another server: the roles; schemas with their privileges;
-- the migrating role's default privileges.
WITH schema AS (
    SELECT *, quote_ident(nspname) AS name FROM pg_namespace WHERE nspname !~ '^pg_' AND nspname <> 'information_schema'
), role AS (
    SELECT oid, quote_ident(rolname) AS name FROM pg_roles
), grantee AS (
    SELECT oid, name FROM role UNION ALL SELECT 0, 'PUBLIC'
), defaults AS (
    SELECT d.defaclacl, d.defaclrole, k.name AS kind, s.nspname,
        format('ALTER DEFAULT PRIVILEGES FOR ROLE %%s%%s ', r.name, ' IN SCHEMA ' || s.name) AS clause
    FROM pg_default_acl d
    JOIN role r ON r.oid = d.defaclrole AND r.name = quote_ident(%(owner)s)
    JOIN (VALUES ('r', 'TABLES'), ('S', 'SEQUENCES'), ('f', 'FUNCTIONS'), ('T', 'TYPES'), ('n', 'SCHEMAS')) k (letter, name)
        ON k.letter = d.defaclobjtype::text
    LEFT JOIN schema s ON s.oid = d.defaclnamespace
    WHERE d.defaclnamespace = 0 OR s.oid IS NOT NULL
), statement (step, schema, text) AS (
    SELECT 1, NULL, 'CREATE ROLE ' || name FROM role WHERE name !~ '^pg_' AND name <> 'postgres'
    UNION ALL
    SELECT 2, nspname, format('CREATE SCHEMA %%s AUTHORIZATION %%I', name, pg_get_userbyid(nspowner)) FROM schema
    UNION ALL
    SELECT 3, nspname, format('COMMENT ON SCHEMA %%s IS %%L', name, obj_description(oid, 'pg_namespace')) FROM schema
    UNION ALL
    SELECT 3, nspname, format('GRANT %%s ON SCHEMA %%s TO %%s', privilege_type, s.name, g.name)
        || CASE WHEN is_grantable THEN ' WITH GRANT OPTION' ELSE '' END
    FROM schema s CROSS JOIN aclexplode(nspacl) a JOIN grantee g ON g.oid = a.grantee
    WHERE a.grantee <> s.nspowner
    UNION ALL  -- an entry without a schema replaces the built-in privileges, which only these two have
    SELECT 3, nspname, clause || format('REVOKE ALL ON %%s FROM PUBLIC', kind) FROM defaults
    WHERE nspname IS NULL AND kind IN ('FUNCTIONS', 'TYPES')
    UNION ALL
    SELECT 4, nspname, clause || format('GRANT %%s ON %%s TO %%s', privilege_type, kind, g.name)
        || CASE WHEN is_grantable THEN ' WITH GRANT OPTION' ELSE '' END
    FROM defaults CROSS JOIN aclexplode(defaclacl) a JOIN grantee g ON g.oid = a.grantee
    WHERE a.grantee <> defaclrole
)
SELECT schema::text, text FROM statement ORDER BY step
