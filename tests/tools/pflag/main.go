// Command pflag answers how Go's pflag reads a command line: the oracle of the project's own reading.
//
// It takes one JSON object {"flags": [{"name", "shorthand", "kind", "default", "usage"}], "cases": [[argument, …], …]} on
// standard input and writes {"usage": text, "results": [{"values": {name: text}, "rest": […]} or {"error": text}]}.
package main

import (
	"bytes"
	"encoding/json"
	"net"
	"os"
	"time"

	"github.com/spf13/pflag"
)

type definition struct {
	Name, Shorthand, Kind, Default, Usage string
}

type question struct {
	Flags []definition
	Cases [][]string
}

type result struct {
	Values map[string]string `json:"values,omitempty"`
	Rest   []string          `json:"rest,omitempty"`
	Error  string            `json:"error,omitempty"`
}

func flagSet(flags []definition) *pflag.FlagSet {
	set := pflag.NewFlagSet("kube-router", pflag.ContinueOnError)
	set.SetOutput(&bytes.Buffer{})
	set.Usage = func() {}
	for _, f := range flags {
		switch f.Kind {
		case "bool":
			set.BoolP(f.Name, f.Shorthand, f.Default == "true", f.Usage)
		case "string":
			set.StringP(f.Name, f.Shorthand, f.Default, f.Usage)
		case "duration":
			value, err := time.ParseDuration(f.Default)
			if err != nil {
				panic(err)
			}
			set.DurationP(f.Name, f.Shorthand, value, f.Usage)
		case "strings":
			var value []string
			if f.Default != "" {
				value = []string{f.Default}
			}
			set.StringSliceP(f.Name, f.Shorthand, value, f.Usage)
		case "uints":
			set.UintSliceP(f.Name, f.Shorthand, nil, f.Usage)
		case "ipSlice":
			set.IPSliceP(f.Name, f.Shorthand, []net.IP{}, f.Usage)
		case "uint":
			set.UintP(f.Name, f.Shorthand, 0, f.Usage)
		case "uint8":
			set.Uint8P(f.Name, f.Shorthand, 0, f.Usage)
		case "uint16":
			set.Uint16P(f.Name, f.Shorthand, 0, f.Usage)
		case "uint32":
			set.Uint32P(f.Name, f.Shorthand, 0, f.Usage)
		default:
			panic(f.Kind)
		}
		flag := set.Lookup(f.Name)
		if f.Default != "" && flag.DefValue == "0" {
			if err := flag.Value.Set(f.Default); err != nil {
				panic(err)
			}
			flag.DefValue = f.Default
		}
	}
	return set
}

func main() {
	var asked question
	if err := json.NewDecoder(os.Stdin).Decode(&asked); err != nil {
		panic(err)
	}
	results := make([]result, 0, len(asked.Cases))
	for _, arguments := range asked.Cases {
		set := flagSet(asked.Flags)
		if err := set.Parse(arguments); err != nil {
			results = append(results, result{Error: err.Error()})
			continue
		}
		values := map[string]string{}
		set.Visit(func(flag *pflag.Flag) { values[flag.Name] = flag.Value.String() })
		results = append(results, result{Values: values, Rest: set.Args()})
	}
	encoder := json.NewEncoder(os.Stdout)
	encoder.SetEscapeHTML(false)
	if err := encoder.Encode(map[string]any{"usage": flagSet(asked.Flags).FlagUsages(), "results": results}); err != nil {
		panic(err)
	}
}
