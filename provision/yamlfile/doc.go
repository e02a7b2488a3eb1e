// Package yamlfile reads the files that people write: strict YAML in which
// every mistake is reported, with its line, in one go.
//
// A reader walks the document once and keeps going after a mistake; what it
// could not read has its zero value. When the walk is over, File.Err returns
// all mistakes in file order, or nil.
//
//	f := yamlfile.Parse("rack.yaml", data)
//	top := f.Root().Fields("rack", "nodes")
//	name := yamlfile.Get(top["rack"].Required(), parseName)
//	for _, n := range top["nodes"].List() { ... }
//	return f.Err()
//
// Anchors and merge keys are not followed: a file that is read at 3 a.m. says
// what it means where it says it.
package yamlfile
