// The packages in each image of an OCI layout, found with OSV-SCALIBR: Debian's, Python's, and the interpreter of the
// official python image, which is no package. The whole of SCALIBR, and syft, take several times as long to compile.
//
//	osv-scalibr LAYOUT NAME     prints {PLATFORM: CycloneDX document} as JSON; NAME and the image's digest are in each
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"log"
	"os"
	"strings"

	"github.com/CycloneDX/cyclonedx-go"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/osv-scalibr/artifact/image/layerscanning/image"
	"github.com/google/osv-scalibr/converter"
	"github.com/google/osv-scalibr/extractor/filesystem"
	"github.com/google/osv-scalibr/extractor/filesystem/language/python/wheelegg"
	"github.com/google/osv-scalibr/extractor/filesystem/os/dpkg"
	scalibrfs "github.com/google/osv-scalibr/fs"
	"github.com/google/osv-scalibr/stats"

	config "github.com/google/osv-scalibr/binary/proto/config_go_proto"
)

func main() {
	index, err := layout.ImageIndexFromPath(os.Args[1])
	check(err)
	found := map[string]*cyclonedx.BOM{}
	describe(index, found)
	check(json.NewEncoder(os.Stdout).Encode(found))
}

func describe(index v1.ImageIndex, found map[string]*cyclonedx.BOM) {
	manifest, err := index.IndexManifest()
	check(err)
	for _, descriptor := range manifest.Manifests {
		if descriptor.MediaType.IsIndex() {
			nested, err := index.ImageIndex(descriptor.Digest)
			check(err)
			describe(nested, found)
		} else {
			img, err := index.Image(descriptor.Digest)
			check(err)
			configuration, err := img.ConfigFile()
			check(err)
			found[configuration.OS+"/"+configuration.Architecture] = bom(img, descriptor.Digest.String(), configuration)
		}
	}
}

func bom(img v1.Image, digest string, configuration *v1.ConfigFile) *cyclonedx.BOM {
	unpacked, err := image.FromV1Image(img, image.DefaultConfig())
	check(err)
	defer unpacked.CleanUp()
	debian, err := dpkg.New(&config.PluginConfig{})
	check(err)
	python, err := wheelegg.New(&config.PluginConfig{})
	check(err)
	inventory, statuses, err := filesystem.Run(context.Background(), &filesystem.Config{
		Extractors: []filesystem.Extractor{debian, python},
		ScanRoots:  []*scalibrfs.ScanRoot{{FS: unpacked.FS()}},
		Stats:      stats.NoopCollector{},
	})
	check(err)
	for _, status := range statuses {
		if status.Status.FailureReason != "" {
			log.Fatalf("%s: %s", status.Name, status.Status)
		}
	}
	document := converter.ToCDX(inventory, converter.CDXConfig{
		ComponentType: "container", ComponentName: os.Args[2], ComponentVersion: digest,
	})
	for _, variable := range configuration.Config.Env {
		if version, ok := strings.CutPrefix(variable, "PYTHON_VERSION="); ok {
			*document.Components = append(*document.Components, cyclonedx.Component{
				Type: cyclonedx.ComponentTypeApplication, Name: "python", Version: version,
				PackageURL: "pkg:generic/python@" + version,
				CPE:        fmt.Sprintf("cpe:2.3:a:python:python:%s:*:*:*:*:*:*:*", version),
			})
		}
	}
	return document
}

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}
