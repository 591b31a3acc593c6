// Trivy's scanner of Kubernetes manifests with its embedded checks. The whole of Trivy takes five times as long to
// compile, and asks a registry for newer checks.
//
//	trivy FOLDER     prints how many checks passed, and the messages of those that failed, as JSON
package main

import (
	"context"
	"encoding/json"
	"log"
	"os"

	"github.com/aquasecurity/trivy/pkg/iac/rego"
	"github.com/aquasecurity/trivy/pkg/iac/scanners/kubernetes"
)

func main() {
	checks := []string{"builtin"}
	scanner := kubernetes.NewScanner(
		rego.WithEmbeddedPolicies(true), rego.WithEmbeddedLibraries(true), rego.WithPolicyNamespaces(checks...),
	)
	results, err := scanner.ScanFS(context.Background(), os.DirFS(os.Args[1]), ".")
	if err != nil {
		log.Fatal(err)
	}
	failed := map[string][]string{}
	for _, result := range results.GetFailed() {
		id := result.Rule().ID
		failed[id] = append(failed[id], result.Description())
	}
	found := map[string]any{"passed": len(results.GetPassed()), "failed": failed}
	if err := json.NewEncoder(os.Stdout).Encode(found); err != nil {
		log.Fatal(err)
	}
}
