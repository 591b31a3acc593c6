-- What an application may use: type, identity, and what it belongs to or has from its table's parent.
WITH relation AS (
    SELECT c.oid, relkind, relispartition, relacl, relowner, r.identity, inhparent, p.identity AS parent
    FROM pg_class c LEFT JOIN pg_inherits ON inhrelid = c.oid,
        pg_identify_object('pg_class'::regclass, c.oid, 0) r, pg_identify_object('pg_class'::regclass, inhparent, 0) p
    WHERE r.schema !~ '^pg_' AND r.schema <> 'information_schema' AND relkind IN ('r', 'p', 'v', 'm', 'f', 'S', 'c')
), object AS (
    SELECT type, identity, acl, owner
    FROM (
        SELECT 'pg_proc'::regclass, oid, coalesce(proacl, acldefault('f', proowner)), proowner FROM pg_proc
        UNION ALL
        SELECT 'pg_type'::regclass, oid, coalesce(typacl, acldefault('T', typowner)), typowner FROM pg_type
        WHERE typtype IN ('e', 'd', 'r')
    ) o (classid, objid, acl, owner), pg_identify_object(classid, objid, 0)
    WHERE schema !~ '^pg_' AND schema <> 'information_schema'
)
SELECT CASE relkind WHEN 'v' THEN 'view' WHEN 'm' THEN 'materialized view' ELSE 'table' END, identity, '{}'::text[]
FROM relation WHERE relkind NOT IN ('S', 'c')
UNION ALL
SELECT 'sequence', identity, '{}' FROM relation s WHERE relkind = 'S' AND NOT EXISTS (  -- of no column
    SELECT FROM pg_depend d WHERE d.classid = 'pg_class'::regclass AND d.objid = s.oid AND d.deptype IN ('a', 'i')
)
UNION ALL
SELECT 'column', format('%s.%I', identity, attname), ARRAY[identity, format('%s.%I', parent, attname)]
FROM relation JOIN pg_attribute ON attrelid = oid
WHERE attnum > 0 AND NOT attisdropped AND relkind <> 'S'
UNION ALL
SELECT 'unique key', format('(%s) of %s', columns, identity), ARRAY[identity, format('(%s) of %s', columns, parent)]
FROM relation r JOIN pg_index ON indrelid = r.oid AND indisunique, LATERAL (
    SELECT string_agg(pg_get_indexdef(indexrelid, number, true), ', ')
        || coalesce(' WHERE ' || pg_get_expr(indpred, r.oid), '')
    FROM generate_series(1, indnkeyatts) number
) key (columns)
UNION ALL
SELECT 'partition', format('%s of %s', identity, parent), ARRAY[identity, parent] FROM relation WHERE relispartition
UNION ALL
SELECT 'privilege', format('%s of %s on %s', privilege_type,
    CASE grantee WHEN 0 THEN 'PUBLIC' ELSE grantee::regrole::text END, identity), ARRAY[identity]
FROM (
    SELECT identity, relacl, relowner FROM relation
    UNION ALL
    SELECT format('%s.%I', identity, attname), attacl, relowner
    FROM relation JOIN pg_attribute ON attrelid = oid
    WHERE NOT attisdropped
    UNION ALL
    SELECT identity, acl, owner FROM object
    UNION ALL
    SELECT quote_ident(nspname), coalesce(nspacl, acldefault('n', nspowner)), nspowner FROM pg_namespace
    WHERE nspname !~ '^pg_' AND nspname <> 'information_schema'
) o (identity, acl, owner), aclexplode(acl)
WHERE grantee <> owner
UNION ALL
SELECT type, identity, '{}' FROM object
UNION ALL
SELECT 'value', format('%L of type %s', enumlabel, enumtypid::regtype), '{}' FROM pg_enum
